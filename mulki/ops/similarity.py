"""similarity: z = s X W^T [N, P], the rows of X and W L2-normalised first if asked for.

It is the one operator whose result is the whole matrix. Gradients for an upstream gradient G:
dX = s G W, dW = s G^T X, ds = <X, G W>, and through u = v / max(|v|, 1e-12) where rows are
normalised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mulki.ops import checks, direct
from mulki.ops.arguments import refuse_transforms, rounded, scalar
from mulki.ops.logits import Operands, logits, wide
from mulki.ops.registry import define


class SimilarityMatrix(NamedTuple):
    features: Tensor  # [N, D]
    prototypes: Tensor  # [P, D]
    scale: Tensor  # 0-d
    normalize: bool = False


def check(x: SimilarityMatrix, *, values: bool = True) -> None:
    checks.operands(x.features, x.prototypes, x.scale)


def reference(x: SimilarityMatrix) -> tuple[Tensor]:  # [N, P] in the dtype of the features
    """The specification, differentiable."""
    dtype = x.features.dtype
    features, prototypes = x.features.to(wide(dtype)), x.prototypes.to(wide(dtype))
    if x.normalize:
        features, prototypes = F.normalize(features, dim=1), F.normalize(prototypes, dim=1)
    return (logits(features, prototypes, x.scale).to(dtype),)


define(
    "similarity",
    SimilarityMatrix,
    check=check,
    reference=reference,
    rows=lambda x: (x.features.shape[0], x.prototypes.shape[0]),
    dtype=lambda dtype: dtype,
    reductions=("none",),
)


def matrix(operands: Operands, normalize: bool = False) -> Tensor:
    """[N, P] in the dtype of the features, in that of autocast under autocast.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    refuse_transforms(operands)
    features, prototypes, scale = rounded(operands)
    x = SimilarityMatrix(features, prototypes, scalar(scale, features), normalize)
    return direct.call("similarity", x, "none")[0]
