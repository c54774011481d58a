"""z = s X W^T in plain PyTorch: what all references share.

Notation: X [N, D] features, W [P, D] prototypes, s scale, z [N, P] logits, m [P] boolean class mask
(True takes part; a masked class has probability zero and no gradient), G = dL/dz. Half-precision
inputs are multiplied in float32: rounding logits to bf16 would drown the gradient of a student that
is near its teacher.
"""

from __future__ import annotations

import functools
from typing import Any

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


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    # out = a b, or out += a b; a [m, k] and b [k, n] of one dtype, out [m, n] wide.
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


@functools.cache
def multiplies_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies this half precision into float32 there."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        multiply(a, a, a.float(), add=True)
        multiply(a, a, a.float())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # the latter of older versions on the device "meta"
        return False
    return True


class _HalfProduct(torch.autograd.Function):
    """X W^T of half precision in float32, where torch has such products."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.mm(x, w.mT, out_dtype=torch.float32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        to_x, to_w = ctx.needs_input_grad
        g = grad.to(x.dtype)
        return g @ w if to_x else None, g.mT @ x if to_w else None


def product(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
) -> Tensor:  # [N, P] wide
    """z = s X W^T, differentiable, and not rounded."""
    dtype = wide(features.dtype)
    if features.dtype != dtype:
        # float16 has too few small numbers for a gradient.
        halves = features.dtype == torch.bfloat16 and not features.is_cpu
        if halves and multiplies_halves(features.device, features.dtype):
            z: Tensor = _HalfProduct.apply(features, prototypes)  # type: ignore[no-untyped-call]
            return z * scale
        features, prototypes = features.to(dtype), prototypes.to(dtype)
    return (features @ prototypes.mT) * scale


def logits(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [P, D]
    scale: Tensor | float,
    class_mask: Tensor | None = None,  # [P] bool
) -> Tensor:  # [N, P] float32, or float64 for float64 inputs
    """z = s X W^T, masked classes at minus infinity."""
    if autocasting(features.device.type):
        with torch.autocast(features.device.type, enabled=False):
            z = product(features, prototypes, scale)
    else:
        z = product(features, prototypes, scale)
    return z if class_mask is None else z.masked_fill(~class_mask, -torch.inf)


def in_range(target: Tensor, classes: int) -> tuple[Tensor, Tensor | None]:
    """Targets as indices, and those that are no class, whose losses are to become NaN.

    On the CPU they were looked at before: None. On a GPU, where values are not read, an index out
    of range would end the process's use of it.
    """
    if target.is_cpu:
        return target, None
    inside = target.clamp(0, classes - 1)
    return inside, inside != target


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
