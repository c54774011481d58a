"""Progress of a run on a terminal: a bar with loss terms, images per second and time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mulki.engine.learn import StepReport


def describe(report: StepReport) -> str:
    """The loss terms of a step on one line."""
    return " ".join(f"{k.removesuffix('_loss')} {v:.3f}" for k, v in report.losses.items())


class RunProgress:
    """One bar for the whole run; without a terminal nothing is drawn.

    Args:
        console: where to draw.
        total: optimiser steps of all tasks.
    """

    def __init__(self, console: Console, total: int):
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[terms]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=max(total, 1), rate="", terms="")
        self._per_second: float | None = None

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def says(self, text: str) -> None:
        """Show what the run is doing, left of the bar."""
        self._bar.update(self._task, description=text)

    def skip(self, steps: int) -> None:
        """Advance the bar by steps that an earlier process made."""
        self._bar.update(self._task, advance=steps)

    def step(self, report: StepReport) -> None:
        """Advance the bar by one optimiser step."""
        now = report.images / report.seconds
        # An exponential average over about ten steps: single steps are too noisy to read.
        self._per_second = now if self._per_second is None else 0.9 * self._per_second + 0.1 * now
        self._bar.update(
            self._task,
            advance=1,
            rate=f"{self._per_second:.0f} img/s",
            terms=describe(report),
        )
