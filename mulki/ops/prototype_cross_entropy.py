"""prototype_cross_entropy: loss_i = -(1 - e) log q_iy - e mean_j log q_ij, q = softmax(z).

z = s X W^T, y the target of row i, e the label smoothing (Szegedy et al., arXiv 1512.00567), the
mean over the C classes that take part. It equals `torch.nn.functional.cross_entropy` of z. A row
whose target is `ignore_index` has loss zero, and a mean is over the other rows. Gradient of a row
with upstream gradient g: G_j = g (q_j - (1 - e) [j = y] - e / C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops import checks, direct
from mulki.ops.arguments import (
    refuse_transforms,
    rounded,
    scalar,
    takes_reduced_form,
    wanted_gradients,
)
from mulki.ops.autograd import register_reduced, register_rows
from mulki.ops.logits import Operands, logit_gradients, logits, narrow, reduce, wide
from mulki.ops.registry import backward_fake, define, reduced_fake

_ARGUMENTS = (
    "Tensor features, Tensor prototypes, Tensor scale, Tensor target, Tensor? class_mask, "
    "float label_smoothing, int ignore_index"
)


def check(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    *,
    values: bool = True,
) -> None:
    checks.operands(features, prototypes, scale)
    checks.class_mask(class_mask, prototypes, values)
    checks.target(target, features, prototypes, class_mask, ignore_index, values)


def check_backward(grad: Tensor, *args: Any, values: bool = True) -> None:
    *arguments, _ = args
    check(*arguments, values=False)
    checks.shape("grad", grad, args[0].shape[:1])
    checks.on_device("grad", grad, args[0].device)


def check_reduced(*args: Any, values: bool = True) -> None:
    *arguments, _, _ = args
    check(*arguments, values=values)


def fake(features: Tensor, *_: object) -> Tensor:
    return features.new_empty(features.shape[0], dtype=wide(features.dtype))


def reference(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
    target: Tensor,  # [N] int64
    class_mask: Tensor | None,  # [P] bool
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:  # [N]
    """The specification, differentiable."""
    log_q = F.log_softmax(logits(features, prototypes, scale, class_mask), dim=1)
    return _rows(log_q, target, class_mask, label_smoothing, ignore_index)


def reference_backward(
    grad: Tensor,  # [N]
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    log_q = F.log_softmax(logits(features, prototypes, scale, class_mask), dim=1)
    dz = _dz(log_q, target, class_mask, label_smoothing, ignore_index, grad)
    return narrow(logit_gradients(dz, features, prototypes, scale, wanted), features)


def reference_reduced(
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_q = F.log_softmax(logits(features, prototypes, scale, class_mask), dim=1)
    labels = target, class_mask, label_smoothing, ignore_index
    loss = _rows(log_q, *labels)
    count = (target != ignore_index).sum() if mean else loss.new_ones(())
    dz = _dz(log_q, *labels, (1 / count.to(loss.dtype)).expand_as(loss))
    return loss.sum() / count, *logit_gradients(dz, features, prototypes, scale, wanted)


def _rows(
    log_q: Tensor,  # [N, P]
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:  # [N]
    kept = target != ignore_index
    picked = log_q.gather(1, target.where(kept, 0).unsqueeze(1)).squeeze(1)
    loss = -(1 - label_smoothing) * picked.masked_fill(~kept, 0)
    if label_smoothing:
        if class_mask is None:
            mean_log_q = log_q.mean(dim=1)
        else:
            mean_log_q = log_q.masked_fill(~class_mask, 0).sum(dim=1) / class_mask.sum()
        loss = loss - label_smoothing * mean_log_q.masked_fill(~kept, 0)
    return loss


def _dz(
    log_q: Tensor,  # [N, P]
    target: Tensor,
    class_mask: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    upstream: Tensor,  # [N]
) -> Tensor:  # [N, P]
    kept = (target != ignore_index).unsqueeze(1)
    dz = log_q.exp()
    if label_smoothing:
        spread = dz.new_ones(dz.shape[1]) if class_mask is None else class_mask.to(dz.dtype)
        dz = dz - label_smoothing * spread / spread.sum()
    index = target.unsqueeze(1).where(kept, 0)
    hit = torch.full_like(upstream, label_smoothing - 1).unsqueeze(1)
    # An ignored row may carry 0/0, the mean over no rows; its gradient is zero all the same.
    return (upstream.unsqueeze(1) * dz.scatter_add(1, index, hit)).masked_fill(~kept, 0)


define(
    "prototype_cross_entropy",
    f"({_ARGUMENTS}) -> Tensor",
    check=check,
    fake=fake,
    reference=reference,
)
define(
    "prototype_cross_entropy_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    check=check_backward,
    fake=backward_fake(leaves=3),
    reference=reference_backward,
)
define(
    "prototype_cross_entropy_reduced",
    # the total; the gradients of features, prototypes and scale
    f"({_ARGUMENTS}, bool mean, bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    check=check_reduced,
    fake=reduced_fake(fake, leaves=3),
    reference=reference_reduced,
)
register_rows("prototype_cross_entropy", leaves=3)
register_reduced("prototype_cross_entropy_reduced", leaves=3)


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
    refuse_transforms(operands)
    features, prototypes, scale = rounded(operands)
    leaves = features, prototypes, scalar(scale, features)
    labels = target, class_mask, label_smoothing, ignore_index
    if takes_reduced_form(reduction, *leaves):
        mean = reduction == "mean"
        total: Tensor
        total, *_ = direct.call(
            "prototype_cross_entropy_reduced", *leaves, *labels, mean, wanted_gradients(*leaves)
        )
        return total
    rows = direct.call("prototype_cross_entropy", *leaves, *labels)
    return reduce(rows, reduction, (target != ignore_index).sum())
