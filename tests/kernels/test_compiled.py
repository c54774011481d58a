"""The kernels compile for every architecture that is served, and spill no register.

python -m tests.kernels.test_compiled    # registers, shared memory and spills of all
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernels.recorded import TARGETS, Launch, arguments_of, compiled, recorded
from mulki.kernels.lookup import OPERATORS as NAMES
from mulki.kernels.lookup import kernel
from mulki.ops.operators import OPERATORS, Request

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


def check(op: str, architecture: str, dtype: str) -> None:
    for launch in launches(op, DTYPES[dtype]):
        found = compiled(launch, TARGETS[architecture])
        name, tile = launch.kernel.__name__, launch.arguments.get("TILE")
        shape = "" if tile is None else "x".join(map(str, tile[:3])) + f", {tile.warps} warps"
        print(f"{architecture} {dtype} {name} {shape}: {found.registers} registers, ", end="")
        print(f"{found.spilled} spilled, {found.shared} bytes shared", flush=True)
        assert found.spilled == 0 and found.shared <= SHARED[architecture]
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
