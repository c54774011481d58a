"""z = s X W^T and the way back, in plain PyTorch: what all references share.

Notation: X [N, D] features, W [P, D] prototypes, s scale, z [N, P] logits, m [P] boolean class mask
(True takes part; a masked class has probability zero and no gradient), G = dL/dz. Half-precision
inputs are multiplied in float32: rounding logits to bf16 would drown the gradient of a student that
is near its teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# X, W, s, as the functions of the operators take them.
Operands = tuple[Tensor, Tensor, Tensor | float]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What inputs of this dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
    class_mask: Tensor | None = None,  # [P] bool
) -> Tensor:  # [N, P] float32, or float64 for float64 inputs
    """z = s X W^T, masked classes at minus infinity."""
    dtype = wide(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        z = scale * (features.to(dtype) @ prototypes.to(dtype).mT)
    z = z.to(dtype)
    return z if class_mask is None else z.masked_fill(~class_mask, -torch.inf)


def logit_gradients(
    dz: Tensor,  # [N, P], dL/dz
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor,  # 0-d
    wanted: Sequence[bool],  # of dX, dW, ds
) -> tuple[Tensor, Tensor, Tensor]:
    """dX = s G W, dW = s G^T X, ds = <X, G W>, wide; those not wanted as empty [0]."""
    x, w = features.to(dz.dtype), prototypes.to(dz.dtype)
    gw = dz @ w if wanted[0] or wanted[2] else None
    dx = dz.new_empty(0) if gw is None or not wanted[0] else scale * gw
    dw = scale * (dz.mT @ x) if wanted[1] else dz.new_empty(0)
    ds = dz.new_empty(0) if gw is None or not wanted[2] else (x * gw).sum()
    return dx, dw, ds


def narrow(
    gradients: tuple[Tensor, Tensor, Tensor], features: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of X and W in the dtype of X, that of s as it is."""
    dx, dw, dscale = gradients
    return dx.to(features.dtype), dw.to(features.dtype), dscale


def reduce(loss: Tensor, reduction: str, count: Tensor | int | None = None) -> Tensor:
    """Sum, mean over `count` rows (all, where it is not given), or the rows as they are."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (loss.shape[0] if count is None else count)


def reduced_rows(loss: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """The sum or the mean of a loss per row, and its gradient with respect to each row."""
    count = loss.shape[0] if mean else 1
    return loss.sum() / count, torch.full_like(loss, 1 / max(count, 1))
