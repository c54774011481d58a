"""What an operator would do on a GPU, recorded on tensors of the device "meta", and compiled.

    steps = recorded(lambda: kernel("teacher_kl")(x, request))
    compiled(steps[0], TARGETS["sm_90"]).registers

Triton's launches are caught where it would start them, all else by torch's dispatcher. Do not
import this under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_ALLOCATIONS = ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like")


class Launch(NamedTuple):
    """A launch of a kernel of ours."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name, options included


class Operation(NamedTuple):
    """An operation of torch that is no view: a product, a sum, an allocation."""

    name: str
    read: list[Tensor]
    written: list[Tensor]

    @property
    def is_product(self) -> bool:
        return self.name in ("mm", "addmm", "bmm", "addmm_")

    @property
    def allocates(self) -> bool:
        return self.name in _ALLOCATIONS


class _Operations(TorchDispatchMode):
    def __init__(self, steps: list[Launch | Operation]) -> None:
        super().__init__()
        self._steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, Tensor):
            read = [a for a in args if isinstance(a, Tensor)]
            self._steps.append(Operation(func.overloadpacket.__name__, read, [out]))
        return out


def recorded(call: Callable[[], object]) -> list[Launch | Operation]:
    """The steps of a call with tensors of the device "meta"."""
    steps: list[Launch | Operation] = []

    def run(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [parameter.name for parameter in self.params]
        steps.append(Launch(self, grid, dict(zip(names, given, strict=False)) | named))

    with mock.patch.object(JITFunction, "run", run), _Operations(steps):
        call()
    return steps


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes of a thread's stack; of AMD's, registers
    shared: int  # bytes of a program
    text: str  # PTX, or AMD's assembly


class _NoDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return -1  # no device that is here, for which kernels are kept

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def compiled(launch: Launch, target: GPUTarget) -> Compiled:
    """Compile a launch. Changes the driver of this process.

    Raises:
        Exception: whatever the compilers raise.
    """
    driver.set_active(_NoDevice(target))
    arguments = dict(launch.arguments)
    if target.backend == "hip" and "TILE" in arguments:
        arguments["TILE"] = arguments["TILE"]._replace(precision="ieee")
    launch.kernel.device_caches.clear()  # of another target
    found = launch.kernel.warmup(grid=launch.grid, **arguments)
    if target.backend == "hip":
        text = found.asm["amdgcn"]
        return Compiled(
            _number("vgpr_count", text),
            _number("vgpr_spill_count", text),
            found.metadata.shared,
            text,
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(found.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"\bREG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    if usage is None:
        raise RuntimeError(f"cuobjdump: wanted the resources of one kernel, got {printed!r}")
    registers, stack, local = map(int, usage.groups())
    return Compiled(registers, stack + local, found.metadata.shared, found.asm["ptx"])


def _number(name: str, assembly: str) -> int:
    found = re.findall(rf"^\s*\.{name}:\s*(\d+)\s*$", assembly, re.MULTILINE)
    return int(found[0])


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of a shape and dtype without values."""
    return torch.empty(shape, dtype=dtype, device="meta")
