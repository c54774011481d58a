"""siglip: loss_i = -sum_j log sigmoid(y_ij (z_ij + b)), y = +1 where j = i + offset, else -1.

z = s U W^T of image features U [N, D] and text features W [P, D]; the loss of SigLIP (arXiv
2303.15343), a row per image; its mean divides by N, not by N^2. With another offset than 0 the rows
are a block of a larger batch: image i has its text in column i + offset, or in no column of this
block. N and P may be zero. Gradient for upstream gradients g: G_ij = -g_i y_ij
sigmoid(-y_ij (z_ij + b)), and that of the bias is its sum.
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

_ARGUMENTS = (
    "Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor logit_bias, int offset"
)
_NAMES = ("image_features", "text_features")


def check(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    *,
    values: bool = True,
) -> None:
    checks.matrices(image_features, text_features, _NAMES)
    for name, value in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        checks.zero_dimensional(name, value)
        checks.on_device(name, value, image_features.device)


def check_backward(grad: Tensor, *args: Any, values: bool = True) -> None:
    check(*args[:5])
    checks.shape("grad", grad, args[0].shape[:1])
    checks.on_device("grad", grad, args[0].device)


def check_reduced(*args: Any, values: bool = True) -> None:
    check(*args[:5])


def fake(image_features: Tensor, *_: object) -> Tensor:
    return image_features.new_empty(image_features.shape[0], dtype=wide(image_features.dtype))


def reference(
    image_features: Tensor,  # [N, D]
    text_features: Tensor,  # [P, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    offset: int = 0,
) -> Tensor:  # [N]
    """The specification, differentiable."""
    z = logits(image_features, text_features, logit_scale) + logit_bias
    return -F.logsigmoid(_signs(z, offset) * z).sum(dim=1)


def reference_backward(
    grad: Tensor,  # [N]
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leaves = image_features, text_features, logit_scale
    dx, dw, dscale, dbias = _gradients(grad, *leaves, logit_bias, offset, wanted)
    return *narrow((dx, dw, dscale), image_features), dbias


def reference_reduced(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    mean: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = image_features, text_features, logit_scale, logit_bias, offset
    total, upstream = reduced_rows(reference(*arguments), mean)
    return total, *_gradients(upstream, *arguments, wanted)


def _gradients(
    upstream: Tensor,  # [N]
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leaves = image_features, text_features, logit_scale
    z = logits(*leaves) + logit_bias
    signs = _signs(z, offset)
    dz = -upstream.unsqueeze(1) * signs * torch.sigmoid(-signs * z)
    gradients = logit_gradients(dz, *leaves, wanted[:3])
    return *gradients, dz.sum() if wanted[3] else dz.new_empty(0)


def _signs(z: Tensor, offset: int) -> Tensor:
    rows, columns = (torch.arange(count, device=z.device) for count in z.shape)
    return 2 * (columns == rows.unsqueeze(1) + offset).to(z.dtype) - 1


define("siglip", f"({_ARGUMENTS}) -> Tensor", check=check, fake=fake, reference=reference)
define(
    "siglip_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    check=check_backward,
    fake=backward_fake(leaves=4),
    reference=reference_backward,
)
define(
    "siglip_reduced",
    # the total; the gradients of image features, text features, scale and bias
    f"({_ARGUMENTS}, bool mean, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=check_reduced,
    fake=reduced_fake(fake, leaves=4),
    reference=reference_reduced,
)
register_rows("siglip", leaves=4)
register_reduced("siglip_reduced", leaves=4)


def loss(operands: Operands, logit_bias: Tensor | float, reduction: str, offset: int = 0) -> Tensor:
    """The sum, the mean over images, or a loss per image [N].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    refuse_transforms(operands, (logit_bias,))
    images, texts, scale = rounded(operands, _NAMES)
    leaves = images, texts, scalar(scale, images), scalar(logit_bias, images)
    if takes_reduced_form(reduction, *leaves):
        mean = reduction == "mean"
        total: Tensor = direct.call(
            "siglip_reduced", *leaves, offset, mean, wanted_gradients(*leaves)
        )[0]
        return total
    return reduce(direct.call("siglip", *leaves, offset), reduction)
