"""Losses that compute the same, checked against each other and timed by turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor

from benchmarks.tables import Cell
from mulki.bench.call_cost import extra_memory, take_turns, timed_call
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
    leaves = list(inputs.leaves.values())

    def step(way: str) -> tuple[Tensor, ...]:
        output = ways[way](*inputs.arguments)
        return (output, *torch.autograd.grad(output, leaves))

    wanted = step("plain")
    for way in ways:
        for got, want in zip(step(way), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    calls = {way: (lambda way=way: timed_call(lambda: step(way), device)) for way in ways}
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
