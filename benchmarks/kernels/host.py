"""What calls and chunks of rows cost the host, without a GPU: microseconds of Python, and calls.

python -m benchmarks.kernels host

dual_teacher_kl's mean with gradients runs on tensors of the device "meta", in few chunks and in
many; the difference is that of a chunk. Triton launches by its own code, but nothing is compiled,
and its driver does nothing. The library's products do nothing either, five a chunk: torch calls
them without Python. On the device "meta" torch makes `new_empty` in Python, seven times as slowly
as elsewhere: `empty` takes its place.

Of steps of training (K = 2, D = 512, bfloat16, all gradients) it says what Python takes: the least
of some turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.kernels.ahead_of_time import precision
from benchmarks.kernels.counts import calls_of, on_meta, step_of
from mulki.kernels import common, schedule
from mulki.ops import autograd

ARCHITECTURE, TARGET = "sm_90", GPUTarget("cuda", 90, 32)
ROWS, P, D = 64, 1000, 512  # of a chunk, and of all
STEPS = ((64, 100), (256, 1000), (4096, 1000))  # N x P
FEW, MANY = 4, 24  # chunks
ROUNDS, LEAST_ROUNDS, SECONDS = 30, 3, 0.2  # of a measurement
TURNS = 3
FIRST = 2  # calls, in which Triton looks around


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


class IdleKernel(triton.compiler.CompiledKernel):
    """What stands for a compiled kernel, and is launched as one."""

    def __init__(self, src: Any) -> None:
        self.src, self.name = src, src.name
        self.module, self.function, self.packed_metadata = object(), 0, ()

    def __del__(self) -> None:
        pass  # nothing was loaded

    @property
    def run(self) -> Callable[..., None]:
        return nothing


def nothing(*arguments: object, **options: object) -> None:
    pass


@contextmanager
def idle(plan: schedule.Plan | None = None) -> Iterator[None]:
    """Launches and products do nothing; with a plan, all losses take that one."""
    products = (torch, "mm"), (torch, "bmm"), (torch, "addmm"), (torch.Tensor, "addmm_")
    compile_kernel = triton.compiler.compile

    def compile_nothing(src: Any, **options: Any) -> Any:
        # Triton may ask after the end, too.
        idles = isinstance(driver._active, NoDevice)
        return IdleKernel(src) if idles else compile_kernel(src, **options)

    with ExitStack() as stack:
        for where, name in products:
            stack.enter_context(mock.patch.object(where, name, nothing))
        stack.enter_context(mock.patch.object(triton.compiler, "compile", compile_nothing))
        stack.enter_context(mock.patch.object(driver, "_active", NoDevice(TARGET)))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", _new_empty))
        if plan is not None:
            stack.enter_context(mock.patch.object(schedule, "plan", lambda problem: plan))
        common.assume_architecture(ARCHITECTURE)
        try:
            yield
        finally:
            common.assume_architecture(None)


def microseconds_of(operator: str, n: int, p: int, d: int, number_format: str) -> float:
    """Of this process, for the step that `counts.counts` counts, its upstream gradient given."""
    step = step_of(operator, n, p, d, number_format, torch.empty((), device="meta"))
    # On the device "meta" torch multiplies in Python.
    multiplied = mock.patch.object(
        autograd, "_times", lambda _g, stored, leaf, _t: _empty(stored, leaf)
    )
    with idle(), on_meta(), multiplied, precision(ARCHITECTURE, number_format):
        return microseconds(step)


def of_a_step(n: int, p: int) -> float:
    """Microseconds of a step of dual_teacher_kl."""
    return microseconds_of("dual_teacher_kl", n, p, D, "bf16")


def _new_empty(like: torch.Tensor, *shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)


def _empty(stored: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return stored.new_empty(stored.shape, dtype=leaf.dtype)


def call_of(chunks: int) -> Callable[[], object]:
    """A call that takes so many chunks."""
    (call,) = calls_of("dual_teacher_kl", chunks * ROWS, P, D, "bf16")
    return call


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
    with idle(schedule.Plan("chunks", ROWS, P)):
        few, many = call_of(FEW), call_of(MANY)
        for call in (few, many):
            call()
        return (measure(many) - measure(few)) / (MANY - FEW)


def microseconds(call: Callable[[], object]) -> float:
    """Of this process, the least of some rounds; not of the first calls."""
    for _ in range(FIRST):
        call()
    took: list[float] = []
    while len(took) < LEAST_ROUNDS or (len(took) < ROUNDS and sum(took) < SECONDS):
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    return 1e6 * min(took)


def main() -> int:
    calls, took = of_a_chunk(python_calls), of_a_chunk(microseconds)
    print(f"a chunk of dual_teacher_kl: {took:.0f} us of Python, {calls:g} calls of ours")
    for n, p in STEPS:
        took = min(of_a_step(n, p) for _ in range(TURNS))
        print(f"a step at {n} x {p}: {took:.0f} us of Python")
    return 0
