"""Losses that compute the same, checked against each other and timed by turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.tables import Cell
from mulki.bench.call_cost import extra_memory, outputs, take_turns, timed
from mulki.bench.cases import Inputs

#: The columns of `side_by_side`, for `benchmarks.tables.markdown`.
TIMES = {
    "loop": "way",
    "ms": "forward and backward, ms:.3f",
    "speedup": "speed-up:.2f",
    "memory_mib": "memory, MiB:.1f",
}


def side_by_side(
    ways: Mapping[str, Callable[..., Tensor]], inputs: Inputs, seconds: float, device: str
) -> list[dict[str, Cell]]:
    """Time and memory of each way; speed-ups are over the way called "plain".

    Raises:
        AssertionError: the ways differ in value or gradients.
    """
    wanted = outputs("both", ways["plain"], inputs)
    for loss in ways.values():
        for got, want in zip(outputs("both", loss, inputs), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    calls = {way: partial(timed, "both", loss, inputs, device) for way, loss in ways.items()}
    times = take_turns(calls, seconds)
    rows: list[dict[str, Cell]] = []
    for way, loss in ways.items():
        found = extra_memory("both", loss, inputs, device)
        of_pairs = [b / a for a, b in zip(times[way], times["plain"], strict=True)]
        rows.append(
            {
                "loop": way,
                "ms": 1e3 * median(times[way]),
                "speedup": median(of_pairs),
                # The process grows by less where it has memory left from before.
                "memory_mib": found["memory"] / 2**20,
            }
        )
    return rows
