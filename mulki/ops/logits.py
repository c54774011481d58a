"""z = s X W^T in plain PyTorch: what all references share.

Notation: X [N, D] features, W [P, D] prototypes, s scale, z [N, P] logits, m [P] boolean class mask
(True takes part; a masked class has probability zero and no gradient), G = dL/dz. Half-precision
inputs are multiplied in float32: rounding logits to bf16 would drown the gradient of a student that
is near its teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

# X, W, s, as the functions of the operators take them.
Operands = tuple[Tensor, Tensor, Tensor | float]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What inputs of this dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def waiting(leaf: Tensor) -> torch.dtype:
    """The dtype of its gradient beside a sum, until that is multiplied by the upstream gradient.

    float16 is wide: a loss scaler must act before a gradient is rounded. bfloat16 has the range of
    float32, and stays, but for the CPU, where gradients of 1 are handed over as they are.
    """
    if leaf.dtype == torch.bfloat16 and leaf.device.type != "cpu":
        return leaf.dtype
    return wide(leaf.dtype)


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


# Asked once: the compiler of torch 2.11 does not know the function.
_HAS_AUTOCAST = {
    kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "xpu", "mps", "meta")
}


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for tensors of this device type; some have none, such as meta."""
    available = _HAS_AUTOCAST.get(device_type)
    if available is None:
        available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)
