"""What is too much for `make test`, which runs a few cases, and of a sweep CI runs a sample."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterator

import pytest


def swept(places: int, every: int) -> Iterator[int]:
    """The numbers of all places, from 1; in CI one in `every`, from a random one on."""
    step = every if "CI" in os.environ else 1
    for number in range(random.Random().randint(1, step), places + 1, step):
        print(f"place {number} of {places}")
        yield number


def mostly_long(cases: Collection[str], *daily: str) -> list[object]:
    """Parameters: daily cases, which `make test` runs, and the others, which are marked long."""
    assert set(daily) <= set(cases)
    long = pytest.mark.long
    return [name if name in daily else pytest.param(name, marks=long) for name in cases]
