"""The functions of the cases: plain PyTorch's and mulki's, the arguments those of `Inputs`.

They return the mean loss, or the matrix of the operator similarity. Those of plain PyTorch are
what is commonly written where no fused loss is at hand: logits stored, `log_softmax`, `kl_div`,
`cross_entropy`; the two pair losses are written as open_clip has them, one product per direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki import functional
from mulki.similarity import Similarity

Loss = Callable[..., Tensor]
Matrix = tuple[Tensor, Tensor, Tensor]  # x [N, D], w [P, D], scale

TEMPERATURE = 2.0


def logits(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """scale x w^T, the scale on the features as open_clip has it."""
    return scale * x @ w.T


def _teacher_kl_1(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix], target: Tensor
) -> Tensor:
    return _kl_of(log_softmax(x, w, scale), log_softmax(*teachers[0])) * TEMPERATURE**2


def _teacher_kl_3(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix, Matrix, Matrix], target: Tensor
) -> Tensor:
    log_q = log_softmax(x, w, scale)
    kl = [_kl_of(log_q, log_softmax(*t)) for t in teachers]
    return torch.stack(kl).mean() * TEMPERATURE**2


def _dual_teacher_kl(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix, Matrix], target: Tensor
) -> Tensor:
    log_q = log_softmax(x, w, scale)
    log_p = [log_softmax(*t) for t in teachers]
    weights = teacher_weights(log_p, target)
    kl = [F.kl_div(log_q, t, reduction="none", log_target=True).sum(dim=1) for t in log_p]
    return (weights * torch.stack(kl, dim=1)).sum(dim=1).mean() * TEMPERATURE**2


def teacher_weights(log_p: Sequence[Tensor], target: Tensor) -> Tensor:
    """[N, K] weights of two teachers, the larger the more probable the label is to one."""
    right = [t.gather(1, target.unsqueeze(1)) for t in log_p]
    return torch.cat(right, dim=1).softmax(dim=1)


def _pair_kl(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix], target: Tensor
) -> Tensor:
    u, v, s = teachers[0]
    of_images = _kl_of(log_softmax(x, w, scale), log_softmax(u, v, s))
    of_texts = _kl_of(log_softmax(w, x, scale), log_softmax(v, u, s))
    return (of_images + of_texts) / 2 * TEMPERATURE**2


def log_softmax(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return F.log_softmax(logits(x, w, scale) / TEMPERATURE, dim=1)


def _kl_of(log_q: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _cross_entropy(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits(x, w, scale), target)


def _contrastive(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0], device=x.device)
    images, texts = logits(x, w, scale), logits(w, x, scale)
    return (F.cross_entropy(images, labels) + F.cross_entropy(texts, labels)) / 2


def _siglip(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = logits(x, w, scale) + bias
    signs = 2 * torch.eye(x.shape[0], dtype=z.dtype, device=z.device) - 1
    return -F.logsigmoid(signs * z).sum() / x.shape[0]


#: Plain PyTorch, by operator. In float64 these are also what the others are verified against.
EAGER: dict[str, Loss] = {
    "teacher_kl_1": _teacher_kl_1,
    "dual_teacher_kl": _dual_teacher_kl,
    "teacher_kl_3": _teacher_kl_3,
    "pair_kl": _pair_kl,
    "prototype_cross_entropy": _cross_entropy,
    "contrastive": _contrastive,
    "siglip": _siglip,
    "similarity": logits,
}


def _from_teachers(
    loss: Loss,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teachers: tuple[Matrix, ...],
    target: Tensor,
    **options: Any,
) -> Tensor:
    others = [Similarity(*t) for t in teachers]
    return loss(Similarity(x, w, scale), others, temperature=TEMPERATURE, **options)


def _mulki_dual_teacher_kl(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teachers: tuple[Matrix, Matrix],
    target: Tensor,
    **options: Any,
) -> Tensor:
    zero_shot, previous = (Similarity(*t) for t in teachers)
    student = Similarity(x, w, scale)
    return functional.dual_teacher_kl(
        student, zero_shot, previous, temperature=TEMPERATURE, target=target, **options
    )


def _mulki_cross_entropy(
    x: Tensor, w: Tensor, scale: Tensor, target: Tensor, **options: Any
) -> Tensor:
    return functional.prototype_cross_entropy(Similarity(x, w, scale), target, **options)


#: Those of losses take options of `mulki.functional` besides.
MULKI: dict[str, Loss] = {
    "teacher_kl_1": partial(_from_teachers, functional.teacher_kl),
    "dual_teacher_kl": _mulki_dual_teacher_kl,
    "teacher_kl_3": partial(_from_teachers, functional.teacher_kl),
    "pair_kl": partial(_from_teachers, functional.pair_teacher_kl),
    "prototype_cross_entropy": _mulki_cross_entropy,
    "contrastive": functional.clip_contrastive,
    "siglip": functional.siglip,
    "similarity": functional.prototype_similarity,
}
