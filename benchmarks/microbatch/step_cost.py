"""Measuring the points of a model: gradients checked, steps timed, memory taken."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import numpy as np
import torch

from benchmarks.microbatch.saved import SavedBytes
from benchmarks.microbatch.workload import Setting, Workload
from benchmarks.tables import Cell, Row
from mulki.bench.call_cost import PeakMemory, no_garbage_collection, take_turns
from mulki.errors import InputError
from mulki.train.learning.memory import free_memory

MIB = 2**20
# Relative L2 distance of a gradient from the whole batch's that rounding explains: matrix products
# of other sizes add up in another order.
TOLERANCE = {"fp32": 1e-4}
TOLERANCE_HALF = 3e-2

Point = tuple[int, int | None]  # B, and the micro-batch if it is not the whole batch

# Larger batches are timed once, and not tried whole.
_MOST_TIMED = 16
# Freed blocks go back to the system at once, so that what the process holds is what is in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(setting: Setting, m: int, factors: Sequence[int], rounds: int) -> list[Row]:
    """Rows of one model: B = M and `factors` times it, in micro-batches and, if it fits, whole.

    Raises:
        InputError: micro-batches do not give the gradients of the whole batch.
    """
    workload = Workload(setting)
    error = gradient_error(workload, m)
    allowed = TOLERANCE.get(setting.precision, TOLERANCE_HALF)
    print(f"{setting.model}: gradients differ from the whole batch's by {error:.1e}", flush=True)
    if not error <= allowed:
        raise InputError(f"{setting.model}: gradients differ by {error:.1e}, allowed {allowed:g}")
    sizes = sorted({m, *(m * f for f in factors)})
    points: list[Point] = [(b, m if b > m else None) for b in sizes]
    fits = _fitting(workload, m)
    points += [(b, None) for b in sizes if m < b <= min(fits, _MOST_TIMED * m)]
    timed = [(b, micro) for b, micro in points if b <= _MOST_TIMED * m]
    times = time_points(workload, timed, rounds)
    for size, micro in points:
        if size > _MOST_TIMED * m:
            times[size, micro] = [workload.step(workload.batch(size), micro)]
    del workload
    rows: list[dict[str, Cell]] = []
    base: dict[str, float] = {}
    for size, micro in points:
        found = in_fresh_process(setting, (size, micro))
        base = base or found
        ratios = {
            f"{name}_ratio": found[f"{name}_mib"] / base[f"{name}_mib"]
            for name in ("saved", "peak", "with_batch")
            if f"{name}_mib" in found
        }
        own, whole = times[size, micro], times.get((size, None))
        of_m = np.divide(times[sizes[0], None], sizes[0])[: len(own)]
        rows.append(
            {
                "model": setting.model,
                "precision": setting.precision,
                "device": setting.device,
                "batch": size,
                "micro_batch": micro or size,
                **found,
                **ratios,
                "ms_per_image": 1e3 * float(np.median(own)) / size,
                "time_ratio": float(np.median(np.divide(own, whole))) if whole else None,
                "time_of_m_ratio": float(np.median(np.divide(own, size) / of_m)),
                "rounds": len(own),
            }
        )
    return list(rows)


def gradient_error(workload: Workload, m: int) -> float:
    """Largest relative L2 distance of a weight's gradient from that of the whole batch, B = 4 M.

    Gradients that are noise, a thousandth of the largest norm or less, are measured by that.
    """
    batch = workload.batch(4 * m)
    found = []
    for micro_batch in (None, m):
        workload.gradients(batch, micro_batch)
        found.append([p.grad.double() for p in workload.weights if p.grad is not None])
    wanted, got = found
    floor = 1e-3 * max(float(w.norm()) for w in wanted)
    pairs = zip(got, wanted, strict=True)
    return max(float((g - w).norm()) / max(float(w.norm()), floor) for g, w in pairs)


def time_points(
    workload: Workload, points: Sequence[Point], rounds: int
) -> dict[Point, list[float]]:
    """Seconds of a step at every point, round by round, in turns."""
    batch = workload.batch(max(b for b, _ in points))
    names = {f"{b} in {m}": (b, m) for b, m in points}
    calls = {
        name: functools.partial(workload.step, batch.head(b), m) for name, (b, m) in names.items()
    }
    with no_garbage_collection():
        times = take_turns(calls, 0.0, rounds)
    return {names[name]: of_point for name, of_point in times.items()}


def in_fresh_process(setting: Setting, point: Point) -> dict[str, float]:
    """What `memory_of` finds."""
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, _MALLOC), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(memory_of, setting, *point).result()


def memory_of(setting: Setting, size: int, micro_batch: int | None) -> dict[str, float]:
    """MiB that a step takes, by what it is.

    Two steps go before, so that the optimiser's state is there, and so are the buffers that
    libraries make once. There are no gradients when the step begins: it makes them.
    """
    workload = Workload(setting)
    small = workload.batch(micro_batch or size)
    for _ in range(2):
        workload.step(small, None)
    del small
    batch = workload.batch(size)
    workload.optimizer.zero_grad()
    state = workload.state_bytes()
    peak = PeakMemory(setting.device)
    workload.step(batch, micro_batch)
    growth = peak.growth()
    saved = SavedBytes([*workload.model.clip.parameters(), *batch.tensors()])
    with saved.watching():
        workload.gradients(batch, micro_batch)
    found = {"state": state, "batch": batch.bytes(), "saved": saved.peak}
    if growth is not None:
        found |= {"growth": growth, "peak": state + growth}
        found["with_batch"] = found["peak"] + found["batch"]
    return {f"{name}_mib": size / MIB for name, size in found.items()}


def _fitting(workload: Workload, m: int) -> int:
    # Images whose graph takes half of what is free.
    batch = workload.batch(m)
    saved = SavedBytes([*workload.model.clip.parameters(), *batch.tensors()])
    with saved.watching():
        workload.gradients(batch, None)
    return int(0.5 * free_memory(torch.device(workload.model.device)) / (saved.peak / m))
