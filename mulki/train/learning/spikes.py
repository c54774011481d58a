"""Steps whose loss is far above that of the steps before: reported, and left out on request."""

from __future__ import annotations

import logging

_log = logging.getLogger(__name__)

# A loss so many times its running mean is reported.
_REPORTED = 10.0
_MOMENTUM = 0.9


class SpikeGuard:
    """Watches the loss of one task.

    Args:
        factor: steps whose loss is more than so many times its running mean are left out; None:
            none is, and those of more than 10 times the mean are counted.
    """

    def __init__(self, factor: float | None = None):
        self._leaves_out = factor is not None
        self._factor = _REPORTED if factor is None else factor
        self._mean: float | None = None
        self._count = 0
        self._first = 0

    def allows(self, loss: float, step: int) -> bool:
        """Whether a step may change the weights."""
        if self._mean is None:
            self._mean = loss
            return True
        largest = self._factor * self._mean
        spike = loss > largest > 0
        if spike:
            self._count += 1
            self._first = self._first or step
        # A spike counts as the largest loss allowed, so a loss that stays high is accepted in time.
        seen = largest if spike else loss
        self._mean = _MOMENTUM * self._mean + (1 - _MOMENTUM) * seen
        return not (spike and self._leaves_out)

    def report(self, task: str) -> None:
        """Warn of the spikes of a task, if there were any."""
        if not self._count:
            return
        done = "left out" if self._leaves_out else "kept; --spike-guard leaves such steps out"
        _log.warning(
            "task %s: the loss of %d steps, step %d the first, was over %g times its running mean "
            "(%s); a lower --lr or --grad-clip-norm may help",
            task,
            self._count,
            self._first,
            self._factor,
            done,
        )

    def state(self) -> list[float | int | None]:
        """What it has seen."""
        return [self._mean, self._count, self._first]

    def restore(self, state: list[float | int | None]) -> None:
        """Set what `state` returned."""
        self._mean, self._count, self._first = state  # type: ignore[assignment]
