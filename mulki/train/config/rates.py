"""Learning rates: those of single tasks, as `--lr-of` has them, and of single steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from mulki.errors import InputError

Schedule = Literal["cosine", "const"]


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


def factor(name: Schedule, step: int, steps: int, warmup: int | None) -> float:
    """The factor of the base learning rate at `step` of `steps`, counted from 0.

    Linear warm-up over `warmup` steps, or a tenth of all for None, then a half cosine to zero or a
    constant, as in open_clip. AdamW's first steps move every weight by the whole learning rate.
    """
    if warmup is None:
        warmup = steps // 10
    if step < warmup:
        return (step + 1) / warmup
    if name == "const":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
