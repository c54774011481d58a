"""Cases for every operator, and what they should give: formulas of their own, under autograd.

Formulas take float64 and are written for reading; nothing here is shared with the package. Operands
are rounded to the dtype of a case first, so only what a kernel does is in the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    temperature, *gate, t2 = options
    rest = own, None, temperature, *gate, t2
    rows = teacher_kl(x, w, scale, teacher_x, teacher_w, teacher_scales, of_rows, *rest)
    columns = teacher_kl(w, x, scale, teacher_w, teacher_x, teacher_scales, of_columns, *rest)
    return KL(
        (rows.loss + columns.loss) / 2,
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


@dataclass
class Case:
    op: str
    args: tuple[Any, ...]

    @property
    def leaves(self) -> int:
        return 4 if self.op == "siglip" else 3

    @property
    def x(self) -> Tensor:
        return self.args[0]

    def double(self) -> tuple[Any, ...]:
        return tuple(_double(a) for a in self.args)

    def upstream(self) -> Tensor:
        """A gradient per row, or per entry of a similarity, of both signs and many sizes."""
        n, p = self.x.shape[0], self.args[1].shape[0]
        size = n * p if self.op == "similarity" else n
        grad = torch.linspace(-1.5, 2, size, dtype=torch.float64)
        if self.op == "similarity":
            return grad.reshape(n, p).to(self.x.dtype)
        return grad.float()

    def expected(self, upstream: Tensor | None = None, mean: bool = False) -> Any:
        """Rows and gradients for an upstream gradient, or the total and its gradients."""
        args = self.double()
        leaves = [a.clone().requires_grad_() for a in args[: self.leaves]]
        out = FORMULAS[self.op](*leaves, *args[self.leaves :])
        if upstream is None:
            count = out.shape[0]
            if self.op == "prototype_cross_entropy":
                count = int((self.args[3] != self.args[6]).sum())
            out = out.sum() / (count if mean else 1)
        else:
            upstream = upstream.double()
        return out.detach(), torch.autograd.grad(out, leaves, upstream)


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return [_double(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def unit(generator: torch.Generator, n: int, d: int) -> Tensor:
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return rows / rows.square().sum(1, keepdim=True).sqrt()


def make(
    name: str,
    dtype: torch.dtype = torch.float32,
    n: int = N,
    p: int = P,
    d: int = D,
    k: int = 2,
    scale: float = 9.0,
) -> Case:
    """A case by its name; a teacher is 3 wider than the model before."""
    generator = torch.Generator().manual_seed(0)
    p = n if name in ("contrastive", "siglip") or name.startswith("pairs") else p
    stretch = torch.linspace(0.5, 3, n, dtype=torch.float64)[:, None] if name == "cosines" else 1
    x = (stretch * unit(generator, n, d)).to(dtype)
    w = unit(generator, p, d).to(dtype)
    widths = [d + 3 * i for i in range(k)]
    teachers = (
        [unit(generator, n, width).to(dtype) for width in widths],
        [unit(generator, p, width).to(dtype) for width in widths],
        torch.tensor([9.0, 4.0, -3.0, 7.0, 5.0, 2.0][:k]),
    )
    mask = torch.arange(p) % 3 != 1
    target = torch.randint(p, (n,), generator=generator)
    kept = torch.where(mask[target], target, p - p % 3 - 3 if p > 3 else 0)
    ignored = torch.where(torch.arange(n) % 4 == 1, -100, kept)
    weights = torch.rand(n, k, generator=generator)
    of_pairs = torch.rand(2, n, k, generator=generator)
    rest: dict[str, tuple[str, tuple[Any, ...]]] = {
        "similarity": ("similarity", (False,)),
        "cosines": ("similarity", (True,)),
        "ce": ("prototype_cross_entropy", (target, None, 0.0, -100)),
        "ce_all": ("prototype_cross_entropy", (ignored, mask, 0.2, -100)),
        "kl": ("teacher_kl", (*teachers, None, None, None, 2.0, 1.0, 0.0, 0.0, True)),
        "kl_label": ("teacher_kl", (*teachers, None, kept, mask, 2.0, 0.5, 0.0, 1.0, True)),
        "kl_confidence": (
            "teacher_kl",
            (*teachers, None, None, None, 1.5, 2.0, 1.0, 0.0, False),
        ),
        "kl_blend": ("teacher_kl", (*teachers, None, kept, mask, 2.0, 1.0, 0.7, 0.4, True)),
        "kl_weights": ("teacher_kl", (*teachers, weights, None, mask, 2.0, 1.0, 0.0, 0.0, True)),
        "contrastive": ("contrastive", ()),
        "pairs": ("pair_kl", (*teachers, None, 2.0, 1.0, 0.0, 0.0, True)),
        "pairs_blend": ("pair_kl", (*teachers, None, 1.5, 0.5, 0.7, 0.4, False)),
        "pairs_weights": ("pair_kl", (*teachers, of_pairs, 2.0, 1.0, 0.0, 0.0, True)),
        "siglip": ("siglip", (torch.tensor(-3.0), 0)),
        "siglip_block": ("siglip", (torch.tensor(-3.0), 18)),  # the last rows have no match
    }
    op, more = rest[name]
    return Case(op, (x, w, torch.tensor(scale), *more))


NAMES = (
    *("similarity", "cosines", "ce", "ce_all"),
    *("kl", "kl_label", "kl_confidence", "kl_blend", "kl_weights"),
    *("contrastive", "pairs", "pairs_blend", "pairs_weights", "siglip", "siglip_block"),
)
LOSSES = NAMES[2:]
