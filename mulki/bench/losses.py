"""The formulas of the operators: plain PyTorch's, and the same by mulki.

All take what `cases.Inputs` holds: x [N, D], w [P, D], scale, then target, bias or teachers, and
options by name. They return the mean loss, another reduction of it, or the matrix of similarity.
Those of plain PyTorch are what is commonly written where no fused loss is at hand: logits stored,
`log_softmax`, `kl_div`, `cross_entropy`; the two pair losses are written as open_clip has them, one
product per direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki import functional, ops
from mulki.similarity import Similarity

Loss = Callable[..., Tensor]
Matrix = tuple[Tensor, Tensor, Tensor]  # x [N, D], w [P, D], scale

TEMPERATURE = 2.0


def logits(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """scale x w^T, the scale on the features as open_clip has it."""
    return scale * x @ w.T


def log_softmax(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    temperature: float = TEMPERATURE,
    class_mask: Tensor | None = None,
) -> Tensor:
    """Of the rows of logits over the temperature; with a mask [P] of its classes alone."""
    z = logits(x, w, scale)
    return F.log_softmax((z if class_mask is None else z[:, class_mask]) / temperature, dim=1)


def teacher_weights(log_p: Sequence[Tensor], target: Tensor) -> Tensor:
    """[N, K] weights of teachers, the larger the more probable the label is to one."""
    right = [t.gather(1, target.unsqueeze(1)) for t in log_p]
    return torch.cat(right, dim=1).softmax(dim=1)


def _similarity(x: Tensor, w: Tensor, scale: Tensor, *, normalize: bool = False) -> Tensor:
    if normalize:
        x, w = F.normalize(x, dim=1), F.normalize(w, dim=1)
    return logits(x, w, scale)


def _cross_entropy(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    target: Tensor,
    *,
    class_mask: Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    z = logits(x, w, scale)
    if class_mask is not None:
        z, target = z[:, class_mask], _renumbered(target, class_mask, ignore_index)
        ignore_index = -100
    return F.cross_entropy(z, target, ignore_index=ignore_index, **options)


def _renumbered(target: Tensor, class_mask: Tensor, ignore_index: int) -> Tensor:
    """The target among the classes that take part."""
    ignored = target == ignore_index
    return (class_mask.cumsum(0) - 1)[target.where(~ignored, 0)].where(~ignored, -100)


def _teacher_kl(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teachers: Sequence[Matrix],
    target: Tensor,
    *,
    temperature: float = TEMPERATURE,
    scale_by_t2: bool = True,
    weights: Tensor | None = None,
    gate: str | None = None,
    class_mask: Tensor | None = None,
    reduction: str = "mean",
    **of_gate: float,
) -> Tensor:
    log_q, *log_p = (
        log_softmax(*model, temperature, class_mask) for model in ((x, w, scale), *teachers)
    )
    factor = temperature**2 if scale_by_t2 else 1.0
    if weights is None and gate is None and reduction == "mean":
        kl = [F.kl_div(log_q, p, reduction="batchmean", log_target=True) for p in log_p]
        return (kl[0] if len(kl) == 1 else torch.stack(kl).mean()) * factor
    kl = [F.kl_div(log_q, p, reduction="none", log_target=True).sum(dim=1) for p in log_p]
    if weights is None:
        if class_mask is not None:
            target = _renumbered(target, class_mask, -100)
        weights = _gated(gate, log_p, target, **of_gate)
    rows = (weights * torch.stack(kl, dim=1)).sum(dim=1)
    return _reduced(rows, reduction) * factor


def _gated(
    gate: str | None,
    log_p: Sequence[Tensor],
    target: Tensor,
    *,
    gate_temperature: float = 1.0,
    gate_entropy: float = 0.0,
    gate_label: float = 0.0,
) -> Tensor:
    """The weights [N, K] of a row-wise gate."""
    if gate == "label" and gate_temperature == 1.0:
        return teacher_weights(log_p, target)
    numbers = {"confidence": (1.0, 0.0), "label": (0.0, 1.0), "blend": (gate_entropy, gate_label)}
    a, b = numbers.get(gate or "", (0.0, 0.0))
    scores = [
        a * (p.exp() * p).sum(dim=1) + b * p.gather(1, target.unsqueeze(1)).squeeze(1)
        for p in log_p
    ]
    return torch.softmax(torch.stack(scores, dim=1) / gate_temperature, dim=1)


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


def _pair_kl(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teachers: Sequence[Matrix],
    target: Tensor,
    *,
    weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    if "gate" in options:
        target = torch.arange(x.shape[0], device=x.device)
    turned = [(v, u, s) for u, v, s in teachers]
    of_images, of_texts = (None, None) if weights is None else weights.unbind()
    images = _teacher_kl(x, w, scale, teachers, target, weights=of_images, **options)
    texts = _teacher_kl(w, x, scale, turned, target, weights=of_texts, **options)
    return (images + texts) / 2


def _contrastive(x: Tensor, w: Tensor, scale: Tensor, *, reduction: str = "mean") -> Tensor:
    labels = torch.arange(x.shape[0], device=x.device)
    images, texts = (
        F.cross_entropy(logits(a, b, scale), labels, reduction=reduction)
        for a, b in ((x, w), (w, x))
    )
    return (images + texts) / 2


def _siglip(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    z = logits(x, w, scale) + bias
    if offset == 0:
        signs = 2 * torch.eye(*z.shape, dtype=z.dtype, device=z.device) - 1
    else:
        signs = torch.full_like(z, -1)
        signs.diagonal(offset).fill_(1)
    losses = -F.logsigmoid(signs * z)
    if reduction == "mean":
        return losses.sum() / x.shape[0]
    return losses.sum(dim=1) if reduction == "none" else losses.sum()


#: Plain PyTorch, by operator. In float64 these are also what the others are verified against.
EAGER: dict[str, Loss] = {
    "teacher_kl_1": _teacher_kl,
    "dual_teacher_kl": partial(_teacher_kl, gate="label"),
    "teacher_kl_3": _teacher_kl,
    "pair_kl": _pair_kl,
    "prototype_cross_entropy": _cross_entropy,
    "contrastive": _contrastive,
    "siglip": _siglip,
    "similarity": _similarity,
}


def _from_teachers(
    loss: Loss,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teachers: Sequence[Matrix],
    target: Tensor,
    *,
    temperature: float = TEMPERATURE,
    **options: Any,
) -> Tensor:
    others = [Similarity(*t) for t in teachers]
    if loss is functional.dual_teacher_kl:
        zero_shot, previous = others
        student = Similarity(x, w, scale)
        return loss(student, zero_shot, previous, temperature=temperature, target=target, **options)
    if options.get("gate") and loss is functional.teacher_kl:
        options["target"] = target
    return loss(Similarity(x, w, scale), others, temperature=temperature, **options)


def _our_cross_entropy(
    x: Tensor, w: Tensor, scale: Tensor, target: Tensor, **options: Any
) -> Tensor:
    return functional.prototype_cross_entropy(Similarity(x, w, scale), target, **options)


def _our_siglip(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    offset: int | None = None,
    reduction: functional.Reduction = "mean",
) -> Tensor:
    if offset is not None:  # a block of a larger batch, as `mulki.losses` has them on ranks
        return ops.siglip.loss((x, w, scale), bias, reduction, offset)
    return functional.siglip(x, w, scale, bias, reduction=reduction)


#: By mulki, with the options of `mulki.functional`.
MULKI: dict[str, Loss] = {
    "teacher_kl_1": partial(_from_teachers, functional.teacher_kl),
    "dual_teacher_kl": partial(_from_teachers, functional.dual_teacher_kl),
    "teacher_kl_3": partial(_from_teachers, functional.teacher_kl),
    "pair_kl": partial(_from_teachers, functional.pair_teacher_kl),
    "prototype_cross_entropy": _our_cross_entropy,
    "contrastive": functional.clip_contrastive,
    "siglip": _our_siglip,
    "similarity": functional.prototype_similarity,
}
