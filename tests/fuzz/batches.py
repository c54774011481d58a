"""Batches of random cases until the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

# What is tried, and what draws its argument.
Tries = Mapping[Callable[[Any], None], st.SearchStrategy[Any]]

BATCH = 50


def try_for(tries: Tries, seconds: float, seed: int, batch: int = BATCH) -> int:
    """Try random cases of each kind in turn; the number of cases.

    Args:
        seconds: no batch begins later; each kind has one batch at least.
        seed: of the cases.
        batch: cases of one kind before the next kind's.

    Raises:
        Exception: a case failed; it is the smallest that Hypothesis found, with the case in a note.
    """
    count, batches = 0, 0
    end = time.monotonic() + seconds
    while batches == 0 or time.monotonic() < end:
        for function, strategy in tries.items():
            count += _batch(function, strategy, seed * 10_000 + batches, batch)
        batches += 1
    return count


def _batch(
    function: Callable[[Any], None], strategy: st.SearchStrategy[Any], seed: int, size: int
) -> int:
    tried = 0

    @seeded(seed)
    @settings(
        max_examples=size,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def attempt(case: Any) -> None:
        nonlocal tried
        tried += 1
        function(case)

    attempt()
    return tried
