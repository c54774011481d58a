"""The kernels compile for sm_80, sm_90 and gfx942, and spill no register on the first two.

python -m tests.kernels.test_compiled    # registers, shared memory and spills of all
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.kernels.recorded import Launch, arguments_of, recorded
from mulki.kernels.lookup import OPERATORS as NAMES
from mulki.kernels.lookup import kernel
from mulki.ops.operators import OPERATORS, Request

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Of a program, in bytes: NVIDIA's CUDA C++ Programming Guide ("Technical Specifications per Compute
# Capability"; sm_80 has that of sm_86 and sm_89, which take its code), and the MI300 ISA guide.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# N, P and D: small, as in training, large, and where products are large.
SHAPES = ((64, 100, 512), (256, 1000, 512), (8192, 1000, 512), (512, 1000, 2048))


def launches(op: str, dtype: torch.dtype) -> Iterator[Launch]:
    """Those of a step at all shapes, each form of a kernel once."""
    seen = set()
    for n, p, d in SHAPES:
        x = arguments_of(op, n, n if op in ("contrastive", "pair_kl") else p, d, dtype)
        loss = op != "similarity"
        request = Request(None, "mean" if loss else "none", [loss] * OPERATORS[op].leaves)
        for step in recorded(lambda x=x, request=request: kernel(op)(x, request)):
            if isinstance(step, Launch):
                given = step.arguments
                form = given.get("TILE"), given.get("logits") is None, given.get("WHOLE")
                if (step.kernel.__name__, form) not in seen:
                    seen.add((step.kernel.__name__, form))
                    yield step


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


def check(op: str, architecture: str, dtype: str) -> None:
    for launch in launches(op, DTYPES[dtype]):
        found = compiled(launch, TARGETS[architecture])
        name, tile = launch.kernel.__name__, launch.arguments.get("TILE")
        shape = "" if tile is None else "x".join(map(str, tile[:3])) + f", {tile.warps} warps"
        print(f"{architecture} {dtype} {name} {shape}: {found.registers} registers, ", end="")
        print(f"{found.spilled} spilled, {found.shared} bytes shared", flush=True)
        assert found.shared <= SHARED[architecture]
        assert found.spilled == 0 or architecture == "gfx942"  # whose tiles nobody has tuned
        if tile is not None and launch.arguments.get("logits") is None and architecture != "gfx942":
            kind = {"bf16": "bf16", "fp16": "f16", "fp32": "tf32"}[dtype]
            assert f".{kind}.{kind}" in found.text or "wgmma" in found.text


@pytest.mark.slow
@pytest.mark.parametrize("op", NAMES)
def test_no_kernel_spills_on_an_h100_in_half_precision(op):
    check(op, "sm_90", "bf16")


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("op", NAMES)
def test_no_kernel_spills(op, architecture, dtype):
    check(op, architecture, dtype)


if __name__ == "__main__":
    for one in NAMES:
        for target in TARGETS:
            for of in DTYPES:
                check(one, target, of)
