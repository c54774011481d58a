"""How long a run still takes, from what it has done so far."""

from __future__ import annotations

from collections.abc import Mapping

# Part of the older measurements that stays when one is added: about the last ten count.
_KEPT = 0.9


class TimeLeft:
    """Work of several kinds, such as steps and test images, and what a unit of each takes.

    Args:
        amounts: units of each kind that the run has to do.
    """

    def __init__(self, amounts: Mapping[str, int]):
        self._left = dict(amounts)
        self._units = dict.fromkeys(amounts, 0.0)
        self._seconds = dict.fromkeys(amounts, 0.0)

    def did(self, kind: str, units: int, seconds: float) -> None:
        """Count work that took so many seconds."""
        self.skip(kind, units)
        self._units[kind] = _KEPT * self._units[kind] + units
        self._seconds[kind] = _KEPT * self._seconds[kind] + seconds

    def skip(self, kind: str, units: int) -> None:
        """Count work that was done before."""
        self._left[kind] = max(self._left[kind] - units, 0)

    def seconds(self, kind: str, units: int) -> float | None:
        """What so many units of a kind take; None before the first of them."""
        if units <= 0:
            return 0.0
        return units * self._seconds[kind] / self._units[kind] if self._units[kind] else None

    def of_run(self) -> float | None:
        """Seconds for all that is left; None while work of a kind that is left is unknown."""
        each = [self.seconds(kind, units) for kind, units in self._left.items()]
        return None if None in each else sum(filter(None, each))


def clock(seconds: float) -> str:
    """Such as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
