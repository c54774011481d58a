"""What the cases of `op_cases` should give: formulas of their own, under autograd.

Formulas take float64 and are written for reading; none is shared with the package. Operands are
rounded to the dtype of a case first, so only what a kernel does is in the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.ops import op_cases

N, P, D = 19, 35, 20  # more than one tile of 16 each, and none of them whole


def logits(x: Tensor, w: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    z = scale * (x @ w.T)
    return z if mask is None else z.masked_fill(~mask, -torch.inf)


def log_softmax(z: Tensor) -> Tensor:
    return z - z.logsumexp(1, keepdim=True)


def similarity(x: Tensor, w: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    if normalize:
        x = x / x.square().sum(1, keepdim=True).sqrt()
        w = w / w.square().sum(1, keepdim=True).sqrt()
    return logits(x, w, scale)


def cross_entropy(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    target: Tensor,
    mask: Tensor | None,
    smoothing: float,
    ignored: int,
) -> Tensor:
    kept = torch.ones(w.shape[0], dtype=torch.bool) if mask is None else mask
    log_q = log_softmax(logits(x, w, scale, kept))
    seen = target != ignored
    to_target = log_q.gather(1, torch.where(seen, target, kept.long().argmax())[:, None])[:, 0]
    return torch.where(seen, -(1 - smoothing) * to_target - smoothing * log_q[:, kept].mean(1), 0)


@dataclass
class KL:
    loss: Tensor
    kl: Tensor
    weights: Tensor
    entropy: Tensor


def teacher_kl(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teacher_x: Sequence[Tensor],
    teacher_w: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor | None,
    target: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    gate_temperature: float,
    gate_entropy: float,
    gate_label: float,
    t2: bool,
) -> KL:
    kept = torch.ones(w.shape[0], dtype=torch.bool) if mask is None else mask
    log_q = log_softmax(logits(x, w, scale)[:, kept] / temperature)
    kl, entropy, labelled = [], [], []
    for u, v, s in zip(teacher_x, teacher_w, teacher_scales, strict=True):
        log_p = log_softmax(logits(u, v, s)[:, kept] / temperature)
        kl.append((log_p.exp() * (log_p - log_q)).sum(1) * (temperature**2 if t2 else 1))
        entropy.append(-(log_p.exp() * log_p).sum(1))
        if target is not None:
            at = kept.long().cumsum(0)[target] - 1
            labelled.append(log_p.gather(1, at[:, None])[:, 0])
    if weights is None:
        score = -gate_entropy * torch.stack(entropy, 1)
        if gate_label:
            score = score + gate_label * torch.stack(labelled, 1)
        weights = torch.softmax(score / gate_temperature, 1)
    stacked = torch.stack(kl, 1)
    return KL((weights * stacked).sum(1), stacked, weights, torch.stack(entropy, 1))


def contrastive(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    z = logits(x, w, scale)
    return (z.logsumexp(1) + z.logsumexp(0)) / 2 - z.diagonal()


def pair_kl(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teacher_x: Sequence[Tensor],
    teacher_w: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor | None,
    *options: Any,
) -> KL:
    """teacher_kl over rows and over columns, the own pair being the target."""
    own = torch.arange(x.shape[0])
    of_rows, of_columns = (None, None) if weights is None else weights
    temperature, *gate, t2, weight, label_weight = options
    rest = own, None, temperature, *gate, t2
    rows = teacher_kl(x, w, scale, teacher_x, teacher_w, teacher_scales, of_rows, *rest)
    columns = teacher_kl(w, x, scale, teacher_w, teacher_x, teacher_scales, of_columns, *rest)
    return KL(
        weight * (rows.loss + columns.loss) / 2 + label_weight * contrastive(x, w, scale),
        torch.stack([rows.kl, columns.kl]),
        torch.stack([rows.weights, columns.weights]),
        torch.stack([rows.entropy, columns.entropy]),
    )


def siglip(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    z = logits(x, w, scale) + bias
    signs = 2 * torch.ones_like(z).tril(offset).triu(offset) - 1
    return torch.log1p(torch.exp(-signs * z)).sum(1)


FORMULAS: dict[str, Callable[..., Any]] = {
    "similarity": similarity,
    "prototype_cross_entropy": cross_entropy,
    "teacher_kl": lambda *args: teacher_kl(*args).loss,
    "contrastive": contrastive,
    "pair_kl": lambda *args: pair_kl(*args).loss,
    "siglip": siglip,
}


class Case(op_cases.Case):
    """A case with what it should give."""

    @property
    def x(self) -> Tensor:
        return self.args[0]

    def double(self) -> tuple[Any, ...]:
        return tuple(map(op_cases.doubled, self.args))

    def upstream(self) -> Tensor:
        return op_cases.upstream(self)

    def expected(self, upstream: Tensor | None = None, mean: bool = False) -> Any:
        """Rows and gradients for an upstream gradient, or the total and its gradients."""
        args = self.double()
        leaves = [a.clone().requires_grad_() for a in args[: self.leaves]]
        out = FORMULAS[self.op](*leaves, *args[self.leaves :])
        if upstream is None:
            out = out.sum() / (op_cases.count(self) if mean else 1)
        else:
            upstream = upstream.double()
        return out.detach(), torch.autograd.grad(out, leaves, upstream)


def make(
    name: str,
    dtype: torch.dtype = torch.float32,
    n: int = N,
    p: int = P,
    d: int = D,
    k: int = 2,
    scale: float = 9.0,
) -> Case:
    """A case by its name, with k teachers whose scales are their own."""
    scales = (9.0, 4.0, -3.0, 7.0, 5.0, 2.0)[:k]
    made = op_cases.make(name, n, p, d, dtype, scale, teacher_scales=scales, stretched=True)
    return Case(*made)


# The others are ce_all and pairs_blend with fewer arguments.
NAMES = tuple(name for name in op_cases.NAMES if name not in ("ce_smooth", "pairs_label"))
LOSSES = NAMES[2:]
