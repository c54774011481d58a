"""siglip: loss_i = -sum_j log sigmoid(y_ij (z_ij + b)), y = +1 where j = i + offset, else -1.

z = s U W^T of image features U [N, D] and text features W [P, D]; the loss of SigLIP (arXiv
2303.15343), a row per image; its mean divides by N, not by N^2. With another offset than 0 the rows
are a block of a larger batch: image i has its text in column i + offset, or in no column of this
block. N and P may be zero. Gradient for upstream gradients g: G_ij = -g_i y_ij
sigmoid(-y_ij (z_ij + b)), and that of the bias is its sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops import calls, checks
from mulki.ops.arguments import rounded, scalar
from mulki.ops.logits import Operands, logits
from mulki.ops.registry import define

_NAMES = ("image_features", "text_features")


class Siglip(NamedTuple):
    image_features: Tensor  # [N, D]
    text_features: Tensor  # [P, D]
    logit_scale: Tensor  # 0-d
    logit_bias: Tensor  # 0-d
    offset: int = 0


def check(x: Siglip, *, values: bool = True) -> None:
    checks.matrices(x.image_features, x.text_features, _NAMES)
    checks.number("logit_scale", x.logit_scale, x.image_features)
    checks.number("logit_bias", x.logit_bias, x.image_features)


def reference(x: Siglip) -> tuple[Tensor]:  # [N]
    """The specification, differentiable."""
    z = logits(x.image_features, x.text_features, x.logit_scale) + x.logit_bias
    signs = torch.full_like(z, -1, requires_grad=False)
    if -z.shape[0] < x.offset < z.shape[1]:
        signs.diagonal(x.offset).fill_(1)
    return (-F.logsigmoid(signs * z).sum(dim=1),)


define("siglip", Siglip, check=check, reference=reference, leaves=4)


def loss(operands: Operands, logit_bias: Tensor | float, reduction: str, offset: int = 0) -> Tensor:
    """The sum, the mean over images, or a loss per image [N].

    Raises:
        TypeError, ValueError: naming the argument.
    """
    images, texts, scale = rounded(operands, _NAMES)
    x = Siglip(images, texts, scalar(scale, images), scalar(logit_bias, images), offset)
    return calls.call("siglip", x, reduction)[0]
