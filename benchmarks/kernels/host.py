"""What a chunk of rows costs the host, without a GPU: microseconds of Python, and calls.

python -m benchmarks.kernels host

dual_teacher_kl's mean with gradients runs on tensors of the device "meta", in few chunks and in
many; the difference is that of a chunk. Triton launches by its own code, up to a driver that does
nothing. The library's products, five a chunk, are left out: they take no Python.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mulki.kernels import common, kernel, schedule

ROWS, P, D = 64, 1000, 512  # of a chunk, and of all
FEW, MANY = 4, 24  # chunks
ROUNDS = 30


class IdleDriver:
    """What Triton asks of a driver; nothing is loaded or launched."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (None, 0, 32, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda *_: {"max_shared_mem": 227 << 10},
    )

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_device(self) -> int:
        return -1  # no number of a device that is here, for which kernels are kept

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def idle() -> Iterator[None]:
    """Launches and products do nothing, and all is in chunks of ROWS."""
    nothing = {torch: ("mm", "addmm"), torch.Tensor: ("addmm_",)}
    plan = schedule.Plan("chunks", ROWS, P)
    with ExitStack() as stack:
        for where, names in nothing.items():
            for name in names:
                stack.enter_context(mock.patch.object(where, name, lambda *_, **options: None))
        stack.enter_context(mock.patch.object(driver, "_active", IdleDriver()))
        stack.enter_context(mock.patch.object(schedule, "plans", lambda problem: (plan,)))
        common.assume_architecture("sm_90")
        try:
            yield
        finally:
            common.assume_architecture(None)


def call_of(chunks: int) -> Callable[[], object]:
    """A call that takes so many chunks."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n = chunks * ROWS
    x, w = new(n, D, dtype=torch.bfloat16), new(P, D, dtype=torch.bfloat16)
    gate = None, new(n, dtype=torch.int64), None, 2.0, 1.0, 0.0, 1.0, True
    arguments = x, w, new(), [x, x], [w, w], new(2), *gate, True, [True] * 3
    return lambda: kernel("teacher_kl_reduced")(*arguments)


def python_calls(call: Callable[[], object]) -> int:
    """How many functions of the kernels' package a call calls."""
    folder, count = str(Path(common.__file__).parent), 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(folder)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


def of_a_chunk(measure: Callable[[Callable[[], object]], float]) -> float:
    """What a chunk adds to what is measured of a call."""
    with idle():
        few, many = call_of(FEW), call_of(MANY)
        for call in (few, many):
            call()  # compiles
        return (measure(many) - measure(few)) / (MANY - FEW)


def microseconds(call: Callable[[], object]) -> float:
    """Of this process, the least of some rounds."""
    took = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    return 1e6 * min(took)


def main() -> int:
    calls, took = of_a_chunk(python_calls), of_a_chunk(microseconds)
    print(f"a chunk of dual_teacher_kl: {took:.0f} us of Python, {calls:g} calls of ours")
    return 0
