"""Learning rate schedules, a factor per step."""

from __future__ import annotations

import math
from typing import Literal

Name = Literal["cosine", "const"]


def factor(name: Name, step: int, steps: int, warmup: int | None) -> float:
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
