"""The one place where a kernel is launched: on the device of its tensors, on its current stream.

`recording` collects launches instead of making them, from tensors on the device "meta": what is
compiled ahead of time is then what would have been launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from . import common

# Products and sums stay apart: a student equal to its teacher then has a KL of exactly zero.
FP_FUSION = False


class Launch(NamedTuple):
    """A launch that was recorded."""

    kernel: Any  # the triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, constexprs included
    options: dict[str, Any]


_recorded: list[Launch] | None = None
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
    with on(device):
        kernel[grid](**arguments, **options)


def on(device: torch.device | None) -> AbstractContextManager[Any]:
    """Makes it the current device: Triton launches there, whatever device the tensors are on."""
    if device is not None and device.type == "cuda":
        return torch.cuda.device(device)
    if device is not None and device.type == "xpu":
        return torch.xpu.device(device)
    return nullcontext()


def is_recording(every_plan: bool = False) -> bool:
    """Whether launches are being recorded (those of every plan that a tile table has)."""
    return _recorded is not None and (_every_plan or not every_plan)


@contextmanager
def recording(architecture: str, every_plan: bool = False) -> Iterator[list[Launch]]:
    """Collect what would be launched on `architecture`, for the default plan or for every one."""
    global _recorded, _every_plan
    assert _recorded is None
    made: list[Launch] = []
    _recorded, _every_plan = made, every_plan
    common.assume_architecture(architecture)
    try:
        yield made
    finally:
        _recorded, _every_plan = None, False
        common.assume_architecture(None)
