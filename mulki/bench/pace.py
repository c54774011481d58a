"""How long a run may go on: what does not fit into its budget is left out, the last first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Pace(Generic[Item]):
    """Hands out one item, and more while the time left is what one has taken so far, on average.

    Args:
        seconds: the budget; 0 for none.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.perf_counter) -> None:
        self._seconds, self._now = seconds, now
        self._start = now()
        self.left_out: list[Item] = []
        self._mean: float | None = None

    def left(self, items: int, expected: float) -> float:
        """Seconds that so many items will take, at most what is left of the budget.

        Args:
            items: that are still to come.
            expected: seconds of one, which count until one is done.
        """
        seconds = items * (expected if self._mean is None else self._mean)
        if self._seconds:
            seconds = min(seconds, max(self._start + self._seconds - self._now(), 0.0))
        return seconds

    def take(self, items: Iterable[Item]) -> Iterator[Item]:
        """The first items, each once the one before is done; `left_out` has the others then."""
        begun = self._now()
        for done, item in enumerate(items):
            here = self._now()
            mean = (here - begun) / max(done, 1)
            self._mean = mean if done else None
            over = done and self._seconds and here + mean > self._start + self._seconds
            if self.left_out or over:
                self.left_out.append(item)
            else:
                yield item


def in_words(seconds: float) -> str:
    """A duration to the precision that an estimate has."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
