"""Tests with many cases: `make test` runs a few of them, `make nightly` all or a sample."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterator

import pytest


def swept(places: int, every: int) -> Iterator[int]:
    """The numbers of all places, from 1; where CI is set one in `every`, from a random one on."""
    step = every if os.environ.get("CI") else 1
    for number in range(random.Random().randint(1, step), places + 1, step):
        print(f"place {number} of {places}")
        yield number


def mostly_long(cases: Collection[str], *daily: str) -> list[object]:
    """Parameters of a test: the daily cases for `make test`, and the others, marked long."""
    assert set(daily) <= set(cases)
    long = pytest.mark.long
    return [name if name in daily else pytest.param(name, marks=long) for name in cases]
