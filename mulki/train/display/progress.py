"""What a run shows while it goes on: a display on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mulki.console import Console
from mulki.train.display.time_left import TimeLeft, clock
from mulki.train.learning.inputs import StepReport

STEPS = "steps"
TEACHERS = "training images"
TEST = "test images"

# Redraws a second.
_RATE = 4
# Seconds between two lines where there is no terminal: few for a long run, whose log is kept.
_OFTEN, _SELDOM, _SHARE = 5.0, 60.0, 0.01
# Seconds of checking images before it is shown; few images need less.
_PATIENCE = 1.0
# Steps after which the time left is shown; the first one is not measured.
_MEASURED = 3


def describe(report: StepReport) -> str:
    """The loss terms of a step on one line."""
    return " ".join(f"{k.removesuffix('_loss')} {v:.3f}" for k, v in report.losses.items())


def megabytes(count: float | None) -> str:
    """Bytes as KiB, MiB or GiB; nothing where they are not known."""
    if count is None:
        return ""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"


def _draws_on(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def checking(
    console: Console, what: str = "checking images"
) -> Iterator[Callable[[int, int], None]]:
    """Yield what shows how many images were checked, of how many, before a run begins.

    A bar on a terminal, and lines elsewhere.

    Args:
        what: is done with the images, where they are not checked.
    """
    columns = what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=_RATE,
        # What goes into a file or a pipe is not taken up into the display.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    )
    row = bar.add_task("", total=None)
    began = printed = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - began < _PATIENCE:
            return
        if _draws_on(console):
            bar.start()
            bar.update(row, completed=done, total=total)
        elif now - printed >= _OFTEN:
            printed = now
            console.print(f"{what}: {done}/{total}", highlight=False)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()


class RunProgress:
    """Shows where a run is, how fast, and how long it still takes.

    On a terminal it is a display of a few lines, which is drawn from a thread of its own: a step
    only stores its numbers. Elsewhere a line is printed every few seconds.

    Args:
        console: where to draw.
        work: what the run has to do: `STEPS`, `TEACHERS` (training images that teachers encode
            before the first step of a task), `TEST` (test images, each as often as it is tested).
        tasks: number of tasks.
    """

    def __init__(self, console: Console, work: Mapping[str, int], tasks: int):
        self._console = console
        self._time = TimeLeft({STEPS: 0, TEACHERS: 0, TEST: 0, **work})
        self._tasks = tasks
        self._task = ""
        self._stage = "starting"
        self._kind = STEPS
        self._done = self._total = self._measured = 0
        self._report: StepReport | None = None
        self._per_second: float | None = None
        self._memory: int | None = None
        self._weights: Mapping[str, float] = {}
        self._began = self._mark = self._printed = time.monotonic()
        self._live = Live(
            console=console,
            get_renderable=self._drawn,
            refresh_per_second=_RATE,
            transient=True,
        )

    def __enter__(self) -> RunProgress:
        if _draws_on(self._console):
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def skip(self, **work: int) -> None:
        """Leave out work that an earlier process did: `steps`, `prepared` and `tested` units."""
        for name, kind in (("steps", STEPS), ("prepared", TEACHERS), ("tested", TEST)):
            self._time.skip(kind, work.get(name, 0))

    def stage(self, text: str, kind: str, total: int, done: int = 0) -> None:
        """Begin a part of the run, of so many units of a kind of work."""
        self._stage, self._kind, self._total, self._done = text, kind, total, done
        self._report = self._per_second = None
        self._mark = time.monotonic()
        self._print_line()

    def task(self, number: int, name: str) -> None:
        """Begin a task, from 1."""
        self._task = f"task {number}/{self._tasks} {name}"
        self._weights = {}

    def advance(self, units: int) -> None:
        """Count units of the stage that have just been done."""
        now = time.monotonic()
        self._done += units
        self._time.did(self._kind, units, now - self._mark)
        self._per_second = units / max(now - self._mark, 1e-9)
        self._mark = now
        self._print_line()

    def step(self, report: StepReport) -> None:
        """Count an optimiser step."""
        self._done = report.step
        if self._measured:
            self._time.did(STEPS, 1, report.seconds)
        else:
            # What a process does once, such as compiling, would count for steps to come.
            self._time.skip(STEPS, 1)
        now = report.images / max(report.seconds, 1e-9)
        # An exponential average over about ten steps: single steps are too noisy to read.
        old = now if self._report is None or self._measured == 1 else self._per_second or now
        self._per_second = 0.9 * old + 0.1 * now
        self._report = report
        self._measured += 1
        left = self._time.of_run()
        if self._measured == _MEASURED and left is not None:
            memory = f", {megabytes(self._memory)} of memory so far" if self._memory else ""
            self.say(f"expected: {clock(left)} for the rest of the run{memory}")
        self._print_line()

    def watch(self, memory: int | None, weights: Mapping[str, float]) -> None:
        """Show the largest memory in use so far, and the mean weight of each teacher."""
        self._memory, self._weights = memory, weights

    def _left(self) -> tuple[str, str]:
        # Of the task's steps, or of the stage, and of the run; empty where it is not known yet.
        if not self._total:
            return "", ""
        stage = self._time.seconds(self._kind, self._total - self._done)
        run = self._time.of_run()
        return "" if stage is None else clock(stage), "" if run is None else clock(run)

    def _speed(self) -> str:
        return "" if self._per_second is None else f"{self._per_second:.0f} img/s"

    def _print_line(self) -> None:
        if _draws_on(self._console) or self._console.quiet:
            return
        now = time.monotonic()
        pause = min(max(_OFTEN, _SHARE * (now - self._began)), _SELDOM)
        if now - self._printed < pause:
            return
        self._printed = now
        stage, run = self._left()
        parts = [
            ": ".join(filter(None, (self._task, self._stage))),
            f"{self._done}/{self._total} {self._kind}",
            stage and f"{stage} left",
            run and f"run {run} left",
            self._speed(),
            megabytes(self._memory),
        ]
        if self._report is not None:
            # The terms are many, and in the files.
            parts.append(f"loss {sum(self._report.losses.values()):.3f}")
        if self._weights and self._kind == STEPS:
            parts.append("teachers " + " ".join(_pairs(self._weights, 2)))
        self.say(f"{time.strftime('%H:%M:%S')} {', '.join(filter(None, parts))}")

    def _drawn(self) -> RenderableType:
        report = self._report
        stage, run = self._left()
        head = Table.grid(expand=True)
        head.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        head.add_column(no_wrap=True, justify="right")
        what = Text.assemble((self._task, "bold"), "  " if self._task else "", self._stage)
        left = filter(None, (stage and f"left {stage}", run and f"run {run}"))
        head.add_row(what, ", ".join(left))
        rows: list[RenderableType] = [head]
        if self._total:
            bar = Table.grid(expand=True, padding=(0, 1))
            bar.add_column(ratio=1)
            bar.add_column(no_wrap=True)
            count = f"{self._done}/{self._total} {self._kind}"
            bar.add_row(ProgressBar(self._total, self._done), count)
            rows.append(bar)
        facts = [self._speed()]
        if report is not None:
            facts.append(f"lr {report.lr:.2e}")
        if self._memory:
            facts.append(f"memory {megabytes(self._memory)}")
        rows.append(Text("  ".join(filter(None, facts))))
        if report is not None:
            terms = {name.removesuffix("_loss"): v for name, v in report.losses.items()}
            rows.append(_labelled(f"loss {sum(terms.values()):.3f}", terms, 3))
        if self._weights and self._kind == STEPS:
            rows.append(_labelled("teachers", self._weights, 2))
        return Group(*rows)


def _pairs(values: Mapping[str, float], digits: int) -> list[str]:
    return [f"{name} {value:.{digits}f}" for name, value in values.items()]


def _labelled(label: str, values: Mapping[str, float], digits: int) -> Table:
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(no_wrap=True, min_width=11)
    row.add_column(style="dim")
    # In columns, so that a name stays with its number.
    row.add_row(label, Columns([Text(pair) for pair in _pairs(values, digits)], padding=(0, 2)))
    return row
