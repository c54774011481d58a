"""The kernels of the public operators: one function each that asks for a backend and calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mulki.ops import backends, schemas

KEYS = ("CPU", "CUDA", "XPU", "MPS")


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


def _router(op: str) -> backends.Kernel:
    # The upstream gradient comes before x.
    position = 1 if op.endswith("_backward") else 0

    def route(*args: Any) -> Any:
        x = args[position]
        kind = x.device.type
        kernel = backends.kernel(op, kind, x.dtype)
        if not autocasting(kind):
            return kernel(*args)
        # Operands are rounded before the operator; inside, autocast would round the logits.
        with torch.autocast(kind, enabled=False):
            return kernel(*args)

    return route


def _scaled(grad: Tensor, stored: Tensor, like: Tensor) -> Tensor:
    return torch.mul(stored, grad, out=torch.empty_like(stored, dtype=like.dtype))


ROUTES = {op: _router(op) for op in schemas.SCHEMAS}
for _op, _route in ROUTES.items():
    for _key in KEYS:
        schemas.library.impl(_op, _route, _key)
schemas.library.impl("scaled", _scaled, "CompositeExplicitAutograd")
