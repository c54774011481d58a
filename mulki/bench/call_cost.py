"""Time and extra memory of a call.

Providers take turns, so that whatever else the machine does slows all of them alike, and the ratio
of two is that of the same round. Everything that a call needs but that is not asked about (an
autocast context, the forward pass before a backward pass) happens off the clock.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mulki.bench.cases import Inputs
from mulki.bench.losses import Loss

_WARM_UP_ROUNDS = 1
_LEAST_ROUNDS = 5

_Given = TypeVar("_Given")
_Found = TypeVar("_Found")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and not again before the end."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def timed(mode: str, loss: Loss, inputs: Inputs, device: str) -> float:
    """Seconds of one call: forward without autograd, backward alone, or both.

    On the CPU by the host's clock: a call finds the caches as the one before it left them. On a GPU
    between two events: it finds an idle device, whose second-level cache holds none of its data.
    """
    leaves = list(inputs.leaves.values())

    def forward(_: object = None) -> Tensor:
        return inputs.call(loss)

    def backward(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, inputs.upstream)

    if mode == "forward":
        with torch.no_grad():
            return _seconds(device, lambda: None, forward)
    if mode == "backward":
        return _seconds(device, forward, backward)
    return _seconds(device, lambda: None, lambda _: backward(forward()))


def _seconds(device: str, prepare: Callable[[], _Given], call: Callable[[_Given], object]) -> float:
    """Of a call, given what `prepare` returns off the clock."""
    given = prepare()
    if torch.device(device).type != "cuda":
        if device != "cpu":
            torch.accelerator.synchronize(device)
        begin = time.perf_counter()
        output = call(given)
        if device != "cpu":
            torch.accelerator.synchronize(device)
        took = time.perf_counter() - begin
        del output
        return took
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    _flusher(device).zero_()
    torch.cuda.synchronize(device)
    start.record(stream)
    output = call(given)
    stop.record(stream)
    stop.synchronize()
    del output
    return start.elapsed_time(stop) / 1e3


@functools.cache
def _flusher(device: str) -> Tensor:
    """Memory of twice the second-level cache: to write it overwrites all that is there."""
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(2 * cache, 1 << 20), dtype=torch.int8, device=device)


def outputs(mode: str, loss: Loss, inputs: Inputs) -> tuple[Tensor, ...]:
    """The loss, `mode` being "forward", or with it the gradients of the leaves."""
    with torch.set_grad_enabled(mode != "forward"):
        output = inputs.call(loss)
        if mode == "forward":
            return (output,)
        gradients = torch.autograd.grad(output, list(inputs.leaves.values()), inputs.upstream)
        return (output.detach(), *gradients)


def take_turns(
    calls: Mapping[str, Callable[[], float]], seconds: float, least_rounds: int = _LEAST_ROUNDS
) -> dict[str, list[float]]:
    """Run every call once a round, in an order drawn anew each round, the same in every run.

    Args:
        calls: by name, each returning its own seconds.
        seconds: how long to go on after warming up, per call.
        least_rounds: that are run in any case, beside those for warming up.

    Returns:
        What each call returned, round by round, those for warming up left out.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    rounds = -_WARM_UP_ROUNDS
    deadline = 0.0
    while rounds < least_rounds or time.perf_counter() < deadline:
        if rounds == 0:
            deadline = time.perf_counter() + seconds * len(names)
        order.shuffle(names)
        for name in names:
            took = calls[name]()
            if rounds >= 0:
                times[name].append(took)
        rounds += 1
    return times


def extra_memory(
    mode: str,
    loss: Loss,
    inputs: Inputs,
    device: str,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, int]:
    """Peak bytes beyond inputs and outputs of one call, `mode` being "forward" or "both".

    Args:
        context: entered around the call, in the thread of the call.

    Returns:
        "memory": what torch's allocator gave out. On the CPU the profiler sees what the calling
        thread allocates, C++ scratch from `at::empty` included, but neither worker threads nor
        the buffers of the matrix library. So on Linux there is "resident_memory" besides, by how
        much the process grew; it sees all of that, but not what an earlier call left allocated.
        On the CPU each of the two has a thread of its own: in one that has called a kernel before,
        the kernel would find the scratch it had left there.
    """

    def call() -> tuple[Tensor, ...]:
        with context():
            return outputs(mode, loss, inputs)

    if device != "cpu":
        return {"memory": _peak_beyond_outputs(call, device) or 0}
    _start_profiler()
    found = {"memory": _in_fresh_thread(lambda: _profiled_memory(call))}
    resident = _in_fresh_thread(lambda: _peak_beyond_outputs(call, device))
    return found if resident is None else found | {"resident_memory": resident}


def _in_fresh_thread(call: Callable[[], _Found]) -> _Found:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


class PeakMemory:
    """How far memory grows from the moment this is made: the allocator's on an accelerator, else
    that of the process, which is known on Linux with glibc alone. A process that has memory left
    from before grows by less, at small sizes by nothing.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._before: int | None = None
        if device != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
            self._before = torch.accelerator.memory_allocated(device)
            return
        with suppress(AttributeError, OSError, TypeError):
            # Freed memory that malloc kept would be taken again without the process growing.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def growth(self) -> int | None:
        """Bytes by which the peak since then lies above what was held then; None if unknown."""
        if self._before is None:
            return None
        if self._device == "cpu":
            return max(0, _status("VmHWM") - self._before)
        return torch.accelerator.max_memory_allocated(self._device) - self._before


def _peak_beyond_outputs(call: Callable[[], tuple[Tensor, ...]], device: str) -> int | None:
    peak = PeakMemory(device)
    outputs = call()
    growth = peak.growth()
    if growth is None:
        return None
    return max(0, growth - sum(t.untyped_storage().nbytes() for t in outputs))


@functools.cache
def _start_profiler() -> None:
    # Kineto announces every start and stop on standard error, and calls it an error there if its
    # first start is not in the thread that loaded torch.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU]):
        pass


def _profiled_memory(call: Callable[[], tuple[Tensor, ...]]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    changes = [(int(e["args"]["Addr"]), int(e["args"]["Bytes"])) for e in memory]
    # An address is used again and again; what stays at the end is its last allocation.
    last = {address: i for i, (address, size) in enumerate(changes) if size > 0}
    kept = {last.get(t.untyped_storage().data_ptr()) for t in outputs}
    held = peak = 0
    for i, (_, size) in enumerate(changes):
        held += 0 if i in kept else size
        peak = max(peak, held)
    return peak


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
