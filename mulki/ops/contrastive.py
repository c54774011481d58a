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
    refuse_tangents,
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
    for name, value in (("grad", grad), ("row_lse", row_lse), ("column_lse", column_lse)):
        checks.shape(name, value, image_features.shape[:1])
        checks.on_device(name, value, image_features.device)


def check_reduced(*args: Any, values: bool = True) -> None:
    check(*args[:3])


def fake(image_features: Tensor, *_: object) -> tuple[Tensor, ...]:
    shape, dtype = image_features.shape[0], wide(image_features.dtype)
    return tuple(image_features.new_empty(shape, dtype=dtype) for _ in range(3))


def reference(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [N, D]
    logit_scale: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:  # loss, lse of each row, lse of each column; all [N]
    """The specification, differentiable in the loss."""
    z = logits(image_features, text_features, logit_scale)
    rows, columns = F.log_softmax(z, dim=1), F.log_softmax(z, dim=0)
    row_lse, column_lse = (z.diagonal() - log.diagonal() for log in (rows, columns))
    return _rows(rows, columns), row_lse, column_lse


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
    dz = _dz(z - row_lse.unsqueeze(1), z - column_lse, grad)
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
    # loss, row_lse, column_lse; all [N]
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
    refuse_tangents(operands)
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
