"""contrastive: loss_i = (lse_j z_ij + lse_j z_ji) / 2 - z_ii, the loss of CLIP on N matching pairs.

z = s U W^T of image features U and text features W, both [N, D]; lse is the logarithm of a sum of
exponentials. It is 1/2 [CE(z, diagonal) + CE(z^T, diagonal)] (arXiv 2103.00020). Gradient for
upstream gradients g, with r and c the softmax of z over rows and over columns:
G_ij = (g_i r_ij + g_j c_ij) / 2 - g_i [i = j].
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
from mulki.ops.logits import Operands, logit_gradients, logits, narrow, reduce, reduced_rows, wide
from mulki.ops.registry import backward_fake, define, reduced_fake

_ARGUMENTS = "Tensor image_features, Tensor text_features, Tensor logit_scale"
_NAMES = ("image_features", "text_features")


def check(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, values: bool = True
) -> None:
    checks.pairs(image_features, text_features)
    checks.zero_dimensional("logit_scale", logit_scale)
    checks.on_device("logit_scale", logit_scale, image_features.device)


def check_backward(
    grad: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    wanted: Sequence[bool],
    *,
    values: bool = True,
) -> None:
    check(image_features, text_features, logit_scale)
    n = image_features.shape[0]
    for name, value, shape in (
        ("grad", grad, (n,)),
        ("row_lse", row_lse, (n, 2)),
        ("column_lse", column_lse, (n, 2)),
    ):
        checks.shape(name, value, shape)
        checks.on_device(name, value, image_features.device)


def check_reduced(*args: Any, values: bool = True) -> None:
    check(*args[:3])


def fake(image_features: Tensor, *_: object) -> tuple[Tensor, ...]:
    n, dtype = image_features.shape[0], wide(image_features.dtype)
    return tuple(image_features.new_empty(shape, dtype=dtype) for shape in (n, (n, 2), (n, 2)))


def reference(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:  # loss [N]; log-sum-exp of rows, of columns, both [N, 2]
    """The specification, differentiable in the loss."""
    z = logits(image_features, text_features, logit_scale)
    rows, columns = F.log_softmax(z, dim=1), F.log_softmax(z, dim=0)
    return _rows(rows, columns), log_sum_exp(z, 1), log_sum_exp(z, 0)


def reference_backward(
    grad: Tensor,  # [N]
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = image_features, text_features, logit_scale
    z = logits(*leaves)
    (row_high, row_low), (high, low) = row_lse.unbind(1), column_lse.unbind(1)
    log_rows = z - row_high.unsqueeze(1) - row_low.unsqueeze(1)
    dz = _dz(log_rows, z - high - low, grad)
    return narrow(logit_gradients(dz, *leaves, wanted), image_features)


def reference_reduced(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    mean: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leaves = image_features, text_features, logit_scale
    z = logits(*leaves)
    rows, columns = F.log_softmax(z, dim=1), F.log_softmax(z, dim=0)
    total, upstream = reduced_rows(_rows(rows, columns), mean)
    return total, *logit_gradients(_dz(rows, columns, upstream), *leaves, wanted)


@torch.no_grad()
def log_sum_exp(z: Tensor, dim: int) -> Tensor:
    """The log-sum-exp as two numbers, the second of which is the rounding of the first.

    One number has too few digits: where logits are 1e4, float32 knows it to 1e-3, and so would the
    backward pass know its probabilities.
    """
    rounded_sum = z.logsumexp(dim, keepdim=True)
    return torch.stack([rounded_sum.squeeze(dim), (z - rounded_sum).logsumexp(dim)], dim=-1)


def _rows(log_rows: Tensor, log_columns: Tensor) -> Tensor:
    return -(log_rows.diagonal() + log_columns.diagonal()) / 2


def _dz(
    log_rows: Tensor,  # [N, N], log-softmax of z over its rows
    log_columns: Tensor,  # [N, N], the same over its columns
    upstream: Tensor,  # [N]
) -> Tensor:  # [N, N]
    g = upstream
    return (g.unsqueeze(1) * log_rows.exp() + g * log_columns.exp()) / 2 - torch.diag(g)


define(
    "contrastive",
    # loss [N]; row_lse, column_lse [N, 2], see `log_sum_exp`
    f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    check=check,
    fake=fake,
    reference=reference,
)
define(
    "contrastive_backward",
    f"(Tensor grad, {_ARGUMENTS}, Tensor row_lse, Tensor column_lse, bool[3] wanted) -> "
    "(Tensor, Tensor, Tensor)",
    check=check_backward,
    fake=backward_fake(leaves=3),
    reference=reference_backward,
)
define(
    "contrastive_reduced",
    # the total; the gradients of image features, text features and scale
    f"({_ARGUMENTS}, bool mean, bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    check=check_reduced,
    fake=reduced_fake(fake, leaves=3),
    reference=reference_reduced,
)
register_rows("contrastive", leaves=3)
register_reduced("contrastive_reduced", leaves=3)


def loss(operands: Operands, logit_bias: Tensor | float | None, reduction: str) -> Tensor:
    """The sum, the mean over pairs, or a loss per pair [N].

    A softmax does not see the bias, and its gradient is zero.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    refuse_transforms(operands)
    images, texts, scale = rounded(operands, _NAMES)
    leaves = images, texts, scalar(scale, images)
    if takes_reduced_form(reduction, *leaves):
        mean = reduction == "mean"
        result: Tensor = direct.call(
            "contrastive_reduced", *leaves, mean, wanted_gradients(*leaves)
        )[0]
    else:
        result = reduce(direct.call("contrastive", *leaves)[0], reduction)
    if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
        result = result + 0 * scalar(logit_bias, images)
    return result
