"""Sweeps over many places, of which CI takes a sample."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator


def swept(places: int, every: int) -> Iterator[int]:
    """The numbers of all places, from 1; in CI one in `every`, from a random one on."""
    step = every if "CI" in os.environ else 1
    for number in range(random.Random().randint(1, step), places + 1, step):
        print(f"place {number} of {places}")
        yield number
