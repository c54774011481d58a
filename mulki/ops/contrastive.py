"""contrastive: loss_i = (lse_j z_ij + lse_j z_ji) / 2 - z_ii, the loss of CLIP on N matching pairs.

z = s U W^T of image features U and text features W, both [N, D]; lse is the logarithm of a sum of
exponentials. It is 1/2 [CE(z, diagonal) + CE(z^T, diagonal)] (arXiv 2103.00020). Gradient for
upstream gradients g, with r and c the softmax of z over rows and over columns:
G_ij = (g_i r_ij + g_j c_ij) / 2 - g_i [i = j].
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mulki.ops import calls, checks
from mulki.ops.arguments import rounded, scalar, with_bias
from mulki.ops.logits import Operands, logits
from mulki.ops.registry import define

_NAMES = ("image_features", "text_features")


class Contrastive(NamedTuple):
    image_features: Tensor  # [N, D]
    text_features: Tensor  # [N, D]
    logit_scale: Tensor  # 0-d


def check(x: Contrastive, *, values: bool = True) -> None:
    checks.pairs(x.image_features, x.text_features)
    checks.number("logit_scale", x.logit_scale, x.image_features)


def reference(x: Contrastive) -> tuple[Tensor]:  # [N]
    """The specification, differentiable."""
    z = logits(*x)
    rows, columns = F.log_softmax(z, dim=1), F.log_softmax(z, dim=0)
    return (-(rows.diagonal() + columns.diagonal()) / 2,)


define("contrastive", Contrastive, check=check, reference=reference)


def loss(operands: Operands, logit_bias: Tensor | float | None, reduction: str) -> Tensor:
    """The sum, the mean over pairs, or a loss per pair [N].

    A softmax does not see the bias, and its gradient is zero.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    images, texts, scale = rounded(operands, _NAMES)
    x = Contrastive(images, texts, scalar(scale, images))
    return with_bias(calls.call("contrastive", x, reduction)[0], logit_bias)
