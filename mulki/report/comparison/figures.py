"""The figures of a comparison: what groups of runs came to, drawn over each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mulki.report.comparison.groups import TITLES, Group, Run, Section
from mulki.report.figures import at_least, mark_tasks, name_rows, thinned
from mulki.report.plot import COLOURS, DIM, Plot, entry, look, plain_log
from mulki.report.tables import measure_of
from mulki.runs.history import StepRecord, read_history
from mulki.runs.metrics import ZERO_SHOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FloatArray = npt.NDArray[np.float64]
# Points of a curve of losses, tasks with a figure of their own, and terms of the loss.
_POINTS, _TASKS, _TERMS = 200, 20, 8
# Percentage points that an axis shows at least; fewer than in a report, for groups are close.
_SPAN = 5.0
_BAND, _LINE = (f"A {what} is from the lowest to the highest seed." for what in ("band", "line"))


@dataclass(frozen=True)
class SectionPlots:
    """The figures of a section.

    Args:
        overall: over all tasks.
        tasks: one for each task, at most 20.
        losses: the total, and terms that groups share.
        measure: what the figures of tasks are of: accuracy, or recall@1 of captions by images.
    """

    overall: tuple[Plot, ...]
    tasks: tuple[Plot, ...]
    losses: tuple[Plot, ...]
    measure: str

    @property
    def all(self) -> tuple[Plot, ...]:
        return (*self.overall, *self.tasks, *self.losses)


def section_plots(section: Section, number: int) -> SectionPlots:
    """Draw a section.

    Args:
        section: of a comparison.
        number: of the section; names of figures begin with it.
    """
    curves = _Curves(section, f"order_{number}")
    losses = _losses(section, f"order_{number}")
    return SectionPlots(
        (*curves.overall(), *_differences(section, f"order_{number}")),
        tuple(curves.task(place) for place in range(min(len(section.tasks), _TASKS))),
        tuple(losses),
        curves.measure,
    )


class _Curves:
    # Accuracies [S, R, T] of each group: seeds, rows of the matrix, and tasks in the order learned.

    def __init__(self, section: Section, prefix: str) -> None:
        self.tasks, self.groups, self.prefix = section.tasks, section.groups, prefix
        self.captions = section.captions
        self.measure = measure_of(self.tasks, self.captions)
        runs = [run for group in section.groups for run in group.runs]
        self.start = int(all(run.data.matrix.zero_shot is not None for run in runs))
        self.rows = [*[ZERO_SHOT] * self.start, *self.tasks]
        self.values = [np.array([self._of(run) for run in group.runs]) for group in section.groups]

    def _of(self, run: Run) -> list[list[float]]:
        matrix = run.data.matrix
        places = [matrix.columns.index(task) for task in self.tasks]
        rows = [*([matrix.zero_shot or ()] if self.start else []), *matrix.rows]
        return [[row[place] for place in places] for row in rows]

    def overall(self) -> Iterator[Plot]:
        count, start, of = len(self.tasks), self.start, self.values
        yield self._plot(
            "learned",
            "Tasks learned so far",
            f"After each task, the mean {self.measure} in percent of all tasks learned by then.",
            f"{self.measure} in percent",
            self.tasks,
            lambda n: [of[n][:, start + i, : i + 1].mean(axis=1) for i in range(count)],
        )
        if start and count > 1:
            # Of accuracies alone the mean may rise just because there is one task less.
            yield self._plot(
                "later",
                "Tasks not learned yet",
                f"After each task, the mean of {self.measure} less that of the start model "
                "(zero-shot), in percentage points, over all tasks that come later. Below zero, "
                "zero-shot ability was lost.",
                "percentage points from zero-shot",
                self.tasks[:-1],
                lambda n: [
                    (of[n][:, i, i:] - of[n][:, 0, i:]).mean(axis=1) for i in range(1, count)
                ],
            )
        if count > 1:
            yield self._plot(
                "forgetting",
                "Change since learned",
                f"After each task, the mean change of the {self.measure} of earlier tasks since "
                "each was learned, in percentage points. Below zero is forgetting.",
                "change in percentage points",
                self.tasks[1:],
                lambda n: [self._change(of[n], i) for i in range(1, count)],
            )
        seen = [[run.data.class_incremental.after for run in group.runs] for group in self.groups]
        if count > 1 and all(set(self.tasks) <= {*each} for group in seen for each in group):
            yield self._plot(
                "class_incremental",
                "All classes seen so far",
                "Accuracy in percent of the images of all tasks learned so far, each classified "
                "among the classes of all of them (class-incremental).",
                "accuracy in percent",
                self.tasks,
                lambda n: [np.array([each[task] for each in seen[n]]) for task in self.tasks],
            )

    def _change(self, of: FloatArray, row: int) -> FloatArray:
        learned = np.stack([of[:, self.start + j, j] for j in range(row)], axis=1)
        return (of[:, self.start + row, :row] - learned).mean(axis=1)

    def task(self, place: int) -> Plot:
        name = self.tasks[place]
        measure = measure_of([name], self.captions)
        plot = self._plot(
            f"task_{place + 1:02d}",
            name,
            f"{measure.capitalize()} in percent of {name} after each task. At the vertical line it "
            "was learned: before it a curve is generalisation, after it forgetting.",
            f"{measure} in percent",
            self.rows,
            lambda n: list(self.values[n][:, :, place].T),
        )

        def draw(axes: Axes) -> int:
            if len(self.rows) > 1:
                axes.axvline(self.start + place, color=DIM, alpha=0.5, linewidth=0.8)
            return plot.draw(axes)

        return Plot(plot.name, plot.title, plot.text, draw)

    def _plot(
        self,
        name: str,
        title: str,
        text: str,
        unit: str,
        rows: Sequence[str],
        curve: Callable[[int], list[FloatArray]],
    ) -> Plot:
        def one_value(axes: Axes) -> int:
            if "points" in unit:
                axes.axvline(0, color=DIM, linewidth=0.8)
            for number in range(len(self.groups)):
                (seeds,) = curve(number)
                ends = seeds.min(), seeds.mean(), seeds.max()
                _dot(axes, number, ends, look(number)[0])
            _name_dots(axes, [group.label for group in self.groups])
            axes.set_xlabel(unit)
            return 0

        def curves(axes: Axes) -> int:
            if "points" in unit:
                axes.axhline(0, color=DIM, linewidth=0.8)
            for number, group in enumerate(self.groups):
                colour, dash = look(number)
                seeds = np.stack(curve(number))  # [rows, S]
                if len(group.runs) > 1:
                    low, high = seeds.min(axis=1), seeds.max(axis=1)
                    axes.fill_between(range(len(rows)), low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(
                    seeds.mean(axis=1),
                    color=colour,
                    linestyle=dash,
                    marker=".",
                    label=entry(group.label),
                )
            if "points" not in unit:
                at_least(axes, _SPAN)
            axes.set_ylabel(unit)
            name_rows(axes, rows)
            return len(self.groups)

        draw, spread = (one_value, _LINE) if len(rows) == 1 else (curves, _BAND)
        if any(len(group.runs) > 1 for group in self.groups):
            text = f"{text} {spread}"
        return Plot(f"{self.prefix}_{name}", title, text, draw)


def _differences(section: Section, prefix: str) -> Iterator[Plot]:
    shown = [
        name
        for name in ("transfer", "average", "last")
        if any(name in each.metrics for each in section.differences)
    ]
    if not shown:
        return

    def draw(axes: Axes) -> int:
        axes.axvline(0, color=DIM, linewidth=0.8)
        apart = 0.8 / len(shown)
        for number, name in enumerate(shown):
            for place, each in enumerate(section.differences):
                if name not in each.metrics:
                    continue
                of = each.metrics[name]
                at = place + (number - (len(shown) - 1) / 2) * apart
                low, high = (of.value if end is None else end for end in (of.low, of.high))
                label = TITLES[name] if not place else None
                _dot(axes, at, (low, of.value, high), COLOURS[number], label)
        _name_dots(axes, [each.label for each in section.differences])
        axes.set_xlabel(f"percentage points more than {entry(section.baseline or '', 26)}")
        return len(shown)

    yield Plot(
        f"{prefix}_differences",
        "Differences from the baseline",
        f"How many percentage points each has more than {section.baseline}, with 95 % intervals. "
        "An interval that holds zero shows no difference.",
        draw,
    )


def _dot(
    axes: Axes,
    at: float,
    ends: tuple[float, float, float],
    colour: str,
    label: str | None = None,
) -> None:
    # A value at this height, with a line from the least to the greatest.
    low, value, high = ends
    axes.plot([low, high], [at, at], color=colour, linewidth=2)
    axes.plot([value], [at], "o", color=colour, label=label, markersize=4)


def _name_dots(axes: Axes, labels: Sequence[str]) -> None:
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=DIM, alpha=0.25, linewidth=0.6)
    axes.set_yticks(range(len(labels)), [entry(label, 26) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _losses(section: Section, prefix: str) -> Iterator[Plot]:
    # A group keeps its colour where another has no history.
    histories = [
        (number, group, of)
        for number, group in enumerate(section.groups)
        if (of := _mean_history(group))
    ]
    if not histories:
        return
    shared = [
        name
        for name in dict.fromkeys(
            name for *_, of in histories for each in of for name in each.losses
        )
        if sum(any(name in each.losses for each in of) for *_, of in histories) > 1
    ]
    yield _loss(
        f"{prefix}_loss",
        "Total loss",
        "The total loss over the steps. Methods whose losses have other terms differ here, "
        "whatever they learn.",
        histories,
        lambda each: sum(each.losses.values()),
    )
    for number, name in enumerate(shared[:_TERMS]):
        title = name.removesuffix("_loss")
        yield _loss(
            f"{prefix}_loss_{number}",
            title,
            f"The weighted term {title} of the loss over the steps.",
            histories,
            lambda each, name=name: each.losses.get(name, math.nan),  # type: ignore[misc]
        )


def _loss(
    name: str,
    title: str,
    text: str,
    histories: Sequence[tuple[int, Group, Sequence[StepRecord]]],
    value: Callable[[StepRecord], float],
) -> Plot:
    def draw(axes: Axes) -> int:
        for number, group, history in histories:
            colour, dash = look(number)
            # A logarithm has no place for zero.
            values = [value(each) or math.nan for each in history]
            steps = [each.total for each in history]
            axes.plot(steps, values, color=colour, linestyle=dash, lw=1.2, label=entry(group.label))
        axes.set_yscale("log")
        plain_log(axes)
        axes.set_ylabel("loss (logarithmic)")
        mark_tasks(axes, max((of for *_, of in histories), key=len))
        return len(histories)

    return Plot(name, title, f"{text} Means over seeds; vertical lines are starts of tasks.", draw)


def _mean_history(group: Group) -> list[StepRecord]:
    # Of the logged steps that all seeds have, or of the first run where they have none in common.
    histories = [history for run in group.runs if (history := _history(run))]
    if not histories:
        return []
    by_step = [{each.total: each for each in history} for history in histories]
    common = [of for of in histories[0] if all(of.total in each for each in by_step)]
    if not common:
        by_step, common = by_step[:1], histories[0]
    return [_mean([each[of.total] for each in by_step]) for of in thinned(common, _POINTS)]


def _history(run: Run) -> list[StepRecord]:
    try:
        return read_history(run.path)
    except OSError:
        return []


def _mean(records: Sequence[StepRecord]) -> StepRecord:
    names = [name for name in records[0].losses if all(name in r.losses for r in records)]
    losses = {name: float(np.mean([r.losses[name] for r in records])) for name in names}
    return replace(records[0], losses=losses)
