"""Learning rates of single tasks, as `--lr-of` has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mulki.errors import InputError


def learning_rates(entries: Sequence[str]) -> dict[str, float]:
    """Base learning rates by task.

    Args:
        entries: each NAME=RATE.

    Raises:
        InputError: an entry of another form, or a rate that is no positive number.
    """
    rates: dict[str, float] = {}
    for entry in entries:
        task, _, rate = entry.rpartition("=")
        try:
            rates[task] = float(rate)
        except ValueError:
            rates[task] = math.nan
        if not task or not 0 < rates[task] < math.inf:
            raise InputError(f"--lr-of: got {entry!r}, wanted NAME=RATE, such as mnist=5e-5")
    return rates
