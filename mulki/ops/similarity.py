"""similarity: z = s X W^T [N, P], the rows of X and W L2-normalised first if asked for.

It is the one operator whose result is the whole matrix. Gradients for an upstream gradient G:
dX = s G W, dW = s G^T X, ds = <X, G W>, and through u = v / max(|v|, 1e-12) where rows are
normalised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops import checks, direct
from mulki.ops.arguments import refuse_transforms, rounded, scalar
from mulki.ops.autograd import register_rows
from mulki.ops.logits import Operands, logit_gradients, logits, narrow, wide
from mulki.ops.registry import backward_fake, define

_ARGUMENTS = "Tensor features, Tensor prototypes, Tensor scale, bool normalize"


def check(
    features: Tensor, prototypes: Tensor, scale: Tensor, normalize: bool, *, values: bool = True
) -> None:
    checks.operands(features, prototypes, scale)


def check_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    normalize: bool,
    wanted: Sequence[bool],
    *,
    values: bool = True,
) -> None:
    check(features, prototypes, scale, normalize)
    checks.shape("grad", grad, (features.shape[0], prototypes.shape[0]))
    checks.on_device("grad", grad, features.device)


def fake(features: Tensor, prototypes: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    return features.new_empty((features.shape[0], prototypes.shape[0]))


def reference(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
    normalize: bool = False,
) -> Tensor:  # [N, P] in the dtype of the features
    """The specification, differentiable."""
    dtype = features.dtype
    if normalize:
        features, prototypes = (
            F.normalize(v.to(wide(dtype)), dim=1) for v in (features, prototypes)
        )
    return logits(features, prototypes, scale).to(dtype)


def reference_backward(
    grad: Tensor,  # [N, P]
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    normalize: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(features.dtype)
    dz, x, w = grad.to(dtype), features.to(dtype).contiguous(), prototypes.to(dtype).contiguous()
    if not normalize:
        return narrow(logit_gradients(dz, x, w, scale, wanted), features)
    units = F.normalize(x, dim=1), F.normalize(w, dim=1)
    dx, dw, dscale = logit_gradients(dz, *units, scale, wanted)
    if wanted[0]:
        dx = _normalize_gradient(dx, x)
    if wanted[1]:
        dw = _normalize_gradient(dw, w)
    return narrow((dx, dw, dscale), features)


def _normalize_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """The gradient through u = v / max(|v|, 1e-12): (g - u <u, g>) / |v| for a row v of `rows`."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    u = rows / norm.clamp(min=1e-12)
    along = (u * grad).sum(dim=1, keepdim=True).masked_fill(norm < 1e-12, 0)
    return (grad - u * along) / norm.clamp(min=1e-12)


define("similarity", f"({_ARGUMENTS}) -> Tensor", check=check, fake=fake, reference=reference)
define(
    "similarity_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    check=check_backward,
    fake=backward_fake(leaves=3),
    reference=reference_backward,
)
register_rows("similarity", leaves=3)


def matrix(operands: Operands, normalize: bool = False) -> Tensor:
    """[N, P] in the dtype of the features, in that of autocast under autocast.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    refuse_transforms(operands)
    features, prototypes, scale = rounded(operands)
    leaves = features, prototypes, scalar(scale, features)
    result: Tensor = direct.call("similarity", *leaves, normalize)
    return result
