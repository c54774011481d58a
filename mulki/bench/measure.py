"""Time, extra memory, and the rate of a plain matrix product.

Providers take turns, so that whatever else the machine does slows all of them alike, and the ratio
of two is that of the same round. Everything that a call needs but that is not asked about (an
autocast context, the forward pass before a backward pass) happens off the clock.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mulki.bench.cases import Inputs
from mulki.bench.providers import Loss

_WARM_UP_ROUNDS = 1  # what is compiled or cached was so when it was verified
_LEAST_ROUNDS = 5


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
    """Seconds of one call: forward without autograd, backward alone, or both."""
    leaves = list(inputs.leaves.values())
    if mode == "forward":
        with torch.no_grad():
            start = _now(device)
            output = loss(*inputs.arguments)
            stop = _now(device)
        del output
        return stop - start
    start = _now(device)
    output = loss(*inputs.arguments)
    if mode == "backward":
        start = _now(device)
    gradients = torch.autograd.grad(output, leaves, inputs.upstream)
    stop = _now(device)
    del gradients
    return stop - start


def _now(device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def take_turns(calls: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Run every call once a round, the first one changing from round to round.

    Args:
        calls: by name, each returning its own seconds.
        seconds: how long to go on, per call; there are five rounds at least.

    Returns:
        What each call returned, round by round, those for warming up left out.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    rounds = 0
    deadline = time.perf_counter() + seconds * len(names)
    while rounds < _WARM_UP_ROUNDS + _LEAST_ROUNDS or time.perf_counter() < deadline:
        first = rounds % max(1, len(names))
        for name in names[first:] + names[:first]:
            took = calls[name]()
            if rounds >= _WARM_UP_ROUNDS:
                times[name].append(took)
        rounds += 1
    return times


def extra_memory(mode: str, loss: Loss, inputs: Inputs, device: str) -> dict[str, int]:
    """Peak bytes beyond inputs and outputs of one call, `mode` being "forward" or "both".

    Returns:
        "memory": what torch's allocator gave out. On the CPU the profiler sees what the calling
        thread allocates, C++ scratch from `at::empty` included, but neither worker threads nor
        the buffers of the matrix library. So on Linux there is "resident_memory" besides, by how
        much the process grew; it sees all of that, but not what an earlier call left allocated.
    """

    def call() -> tuple[Tensor, ...]:
        if mode == "forward":
            with torch.no_grad():
                return (loss(*inputs.arguments),)
        output = loss(*inputs.arguments)
        gradients = torch.autograd.grad(output, list(inputs.leaves.values()), inputs.upstream)
        return (output.detach(), *gradients)

    if device != "cpu":
        return {"memory": _accelerator_memory(call, device)}
    found = {"memory": _profiled_memory(call)}
    resident = _resident_memory(call)
    return found if resident is None else found | {"resident_memory": resident}


def _accelerator_memory(call: Callable[[], tuple[Tensor, ...]], device: str) -> int:
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    outputs = call()
    after = torch.accelerator.max_memory_allocated(device)
    return after - before - sum(t.untyped_storage().nbytes() for t in outputs)


def _profiled_memory(call: Callable[[], tuple[Tensor, ...]]) -> int:
    # Kineto announces every start and stop on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
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


def _resident_memory(call: Callable[[], tuple[Tensor, ...]]) -> int | None:
    try:
        # Freed memory that malloc kept would be taken again without the process growing.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (AttributeError, OSError, TypeError):  # not Linux with glibc
        return None
    outputs = call()
    grown = _status("VmHWM") - before
    return max(0, grown - sum(t.untyped_storage().nbytes() for t in outputs))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def product_rate(dtype: torch.dtype, device: str) -> float:
    """The best rate of `torch.mm` in operations per second, on squares of 512 and up.

    The squares double until one product takes a twentieth of a second.
    """
    best, took, size = 0.0, 0.0, 512
    while took < 0.05 and size <= 16384:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        runs = []
        for _ in range(4):
            start = _now(device)
            torch.mm(a, b)
            runs.append(_now(device) - start)
        took = min(runs)
        best = max(best, 2 * size**3 / took)
        size *= 2
    return best
