"""Compiles the kernels that calls would launch, into Triton's cache, without touching a GPU.

The calls run on tensors of the device "meta", and their launches are recorded. Triton then compiles
each for a GPU that only the process with the GPU has to have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from mulki.kernels.launch import Launch, recording
from mulki.kernels.lookup import kernel
from mulki.ops.operators import OPERATORS


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return -1  # no number of a device that is here, for which kernels are kept

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


class _Kernels(TorchDispatchMode):
    """Operators are computed by the Triton kernels on any device."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        space, _, name = function._schema.name.partition("::")
        if space == "mulki" and name == "pair_kl_gradients":
            # It asks a value, and for other gradients than the stored ones computes them anew.
            return self._computed("pair_kl", args[1:])[-3:]
        if space == "mulki" and name in OPERATORS:
            return self._computed(name, args)
        return function(*args, **(kwargs or {}))

    def _computed(self, name: str, args: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = kernel(name)(*OPERATORS[name].split(args))
        return found


def launches_of(calls: Iterable[Callable[[], object]], architecture: str) -> list[Launch]:
    """What calls on the device "meta" would launch on a GPU of this architecture."""
    with recording(architecture) as recorded, _Kernels():
        for call in calls:
            call()
    return [one for one in recorded if isinstance(one, Launch)]


def compile_launched(launches: Iterable[Launch], target: Any) -> None:
    """Compile kernels for one of Triton's targets, each once. Changes the driver of this process.

    Raises:
        Exception: whatever the compilers raise.
    """
    driver.set_active(NoDevice(target))
    for one in launches:
        one.kernel.warmup(grid=one.grid, **one.arguments, **one.options)
