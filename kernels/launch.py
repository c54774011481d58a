"""Launches a kernel on the device of its tensors, on the current stream. All launches go here.

`multiply` launches a matrix product of the library that torch calls (cuBLAS, hipBLAS). `recording`
collects what operators launch instead of launching it. The operators then run on tensors of the
device "meta": `ahead_of_time` compiles what a GPU would have been given, and
`python -m benchmarks.kernels plan` counts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import common

# No fused multiply-add: then a student that equals its teacher has a KL of exactly zero.
FP_FUSION = False


class Launch(NamedTuple):
    """A launch that was recorded."""

    kernel: Any  # the triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, constexprs included
    options: dict[str, Any]


class Product(NamedTuple):
    """A product of the library that was recorded: [m, k] times [k, n]."""

    a: Tensor
    b: Tensor
    out: Tensor
    add: bool


_recorded: list[Launch | Product] | None = None
_every_plan = False


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    warps: int,
    stages: int,
    **arguments: Any,
) -> None:
    """Launch `kernel` over `grid`, unless launches are being recorded."""
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": FP_FUSION}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, options))
        return
    with current_device(device):
        kernel[grid](**arguments, **options)


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write a b to `out`, or add it to what is there; `out` is float32 or of the operands' dtype.

    float32 is multiplied as torch's setting says. The interpreter's CPU multiplies in float32.
    """
    if _recorded is not None:
        _recorded.append(Product(a, b, out, add))
        return
    if a.device.type == "cpu":
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def current_device(device: torch.device | None) -> AbstractContextManager[Any]:
    """Makes `device` the current one. Triton launches there, wherever the tensors are."""
    if device is not None and device.type == "cuda":
        return torch.cuda.device(device)
    if device is not None and device.type == "xpu":
        return torch.xpu.device(device)
    return nullcontext()


def is_recording(every_plan: bool = False) -> bool:
    """Whether launches are recorded; with `every_plan`, whether those of all plans are."""
    return _recorded is not None and (_every_plan or not every_plan)


@contextmanager
def recording(architecture: str, every_plan: bool = False) -> Iterator[list[Launch | Product]]:
    """Collect the launches for `architecture`: of the default plan, or of every plan."""
    global _recorded, _every_plan
    assert _recorded is None
    launches: list[Launch | Product] = []
    _recorded, _every_plan = launches, every_plan
    common.assume_architecture(architecture)
    try:
        yield launches
    finally:
        _recorded, _every_plan = None, False
        common.assume_architecture(None)
