"""prototype_cross_entropy: loss_i = -(1 - e) log q_iy - e mean_j log q_ij, q = softmax(z).

z = s X W^T, y the target of row i, e the label smoothing (Szegedy et al., arXiv 1512.00567), the
mean over the C classes that take part. It equals `torch.nn.functional.cross_entropy` of z. A row
whose target is `ignore_index` has loss zero, and a mean is over the other rows. Gradient of a row
with upstream gradient g: G_j = g (q_j - (1 - e) [j = y] - e / C).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops import calls, checks
from mulki.ops.arguments import rounded, scalar
from mulki.ops.logits import Operands, in_range, logits, product
from mulki.ops.registry import define


class PrototypeCrossEntropy(NamedTuple):
    features: Tensor  # [N, D]
    prototypes: Tensor  # [P, D]
    scale: Tensor  # 0-d
    target: Tensor  # [N] int64
    class_mask: Tensor | None  # [P] bool
    label_smoothing: float
    ignore_index: int


def check(x: PrototypeCrossEntropy, *, values: bool = True) -> None:
    checks.operands(x.features, x.prototypes, x.scale)
    checks.class_mask(x.class_mask, x.prototypes, values)
    checks.target(x.target, x.features, x.prototypes, x.class_mask, x.ignore_index, values)


def reference(x: PrototypeCrossEntropy) -> tuple[Tensor]:  # [N]
    """The specification, differentiable."""
    kept = (x.target != x.ignore_index).unsqueeze(1)
    # An ignored row may hold anything; its gradient is zero all the same.
    z = logits(x.features, x.prototypes, x.scale).where(kept, 0)
    if x.class_mask is not None:
        z = z.masked_fill(~x.class_mask, -torch.inf)
    log_q = F.log_softmax(z, dim=1)
    index, outside = in_range(x.target.unsqueeze(1).where(kept, 0), len(x.prototypes))
    loss = log_q.gather(1, index) * (x.label_smoothing - 1)
    if x.label_smoothing:
        active = log_q if x.class_mask is None else log_q.masked_fill(~x.class_mask, 0)
        count = log_q.shape[1] if x.class_mask is None else x.class_mask.sum()
        loss = loss - x.label_smoothing * (active.sum(dim=1, keepdim=True) / count)
    if outside is not None:
        loss = loss.masked_fill(outside, torch.nan)
    return (loss.where(kept, 0).squeeze(1),)


def formula(x: PrototypeCrossEntropy, reduction: str, details: bool) -> tuple[Tensor]:
    """The sum, or the mean over rows that are not ignored, by the fewest operations."""
    of_kept = x.target != x.ignore_index
    # PyTorch's own gradient of an ignored row is not zero where it holds a NaN.
    if x.class_mask is None and x.target.is_cpu and of_kept.all():
        z = product(x.features, x.prototypes, x.scale)
        smoothing = x.label_smoothing
        return (F.cross_entropy(z, x.target, label_smoothing=smoothing, reduction=reduction),)
    total = reference(x)[0].sum()
    if reduction == "sum":
        return (total,)
    count = of_kept.sum()
    # The mean over no rows is NaN, and has a gradient, zero.
    return (total / count.clamp(min=1) + 0.0 / count,)


define(
    "prototype_cross_entropy",
    PrototypeCrossEntropy,
    check=check,
    reference=reference,
    formula=formula,
    averaged=lambda x: (x.target != x.ignore_index).sum(),
)


def loss(
    operands: Operands,
    target: Tensor,  # [N] int64
    class_mask: Tensor | None,  # [P] bool
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The sum, the mean over rows that are not ignored, or a loss per row [N].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    features, prototypes, scale = rounded(operands)
    labels = target, class_mask, label_smoothing, ignore_index
    x = PrototypeCrossEntropy(features, prototypes, scalar(scale, features), *labels)
    return calls.call("prototype_cross_entropy", x, reduction)[0]
