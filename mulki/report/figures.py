"""The figures of a report: what is drawn of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mulki.report.contents import RunContents
from mulki.report.plot import COLOURS, DIM, TEXT, Plot, entry, look, plain_log
from mulki.report.tables import measure_of, recalls_of
from mulki.runs.history import BINS, StepRecord, mean_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Points of a curve; more are no wider than the page.
_POINTS = 400
# The axis begins at this part of the highest loss: else a term near zero would take all room.
_LOWEST = 1e-4
# Percentage points that an axis of accuracies shows at least.
_SPAN = 20.0


def plots(contents: RunContents) -> list[Plot]:
    """The figures of what a run folder holds."""
    return [*_of_matrix(contents), *_of_history(thinned(contents.history))]


def thinned(history: Sequence[StepRecord], points: int = _POINTS) -> list[StepRecord]:
    """At most about `points` of the steps, evenly, with the first and the last of each task."""
    every = math.ceil(len(history) / points) or 1
    last = len(history) - 1
    return [
        record
        for place, record in enumerate(history)
        if place % every == 0
        or place == last
        or record.prepared is not None
        or record.index != history[place + 1].index
    ]


def _of_matrix(contents: RunContents) -> Iterator[Plot]:
    matrix, seen = contents.data.matrix, contents.data.class_incremental
    rows = matrix.named_rows()
    names = [name for name, _ in rows]
    shown = [name for name in (*matrix.tasks, *matrix.columns) if name in matrix.columns]
    shown = list(dict.fromkeys(shown))
    measure = measure_of(shown, recalls_of(contents.evaluations))

    def curve(name: str) -> list[float]:
        return [row[matrix.columns.index(name)] for _, row in rows]

    if len(rows) > 1:

        def accuracy(axes: Axes) -> int:
            for number, name in enumerate(shown):
                colour, dash = look(number)
                axes.plot(curve(name), color=colour, linestyle=dash, label=entry(name))
                if name in names:
                    place = names.index(name)
                    axes.plot([place], [curve(name)[place]], "o", color=colour, markersize=6)
            at_least(axes, _SPAN)
            axes.set_ylabel(f"{measure} in percent")
            name_rows(axes, names)
            return len(shown)

        yield Plot(
            "accuracy",
            f"{measure.capitalize()} of each data set",
            f"After each task, the {measure} in percent of each data set. A dot marks the model "
            "that has just learned it: before the dot a curve is generalisation, after it "
            "forgetting.",
            accuracy,
        )
    later = [name for name in matrix.tasks[:-1] if name in matrix.columns]
    if later:

        def change(axes: Axes) -> int:
            axes.axhline(0, color=DIM, linewidth=0.8)
            for number, name in enumerate(later):
                colour, dash = look(number)
                values = curve(name)[names.index(name) :]
                since = [value - values[0] for value in values]
                axes.plot(since, color=colour, linestyle=dash, marker=".", label=entry(name))
            # Not a range of hundredths where nothing has changed.
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, -1), max(high, 1))
            axes.set_ylabel("change in percentage points")
            axes.set_xlabel("tasks learned since")
            _whole_ticks(axes)
            return len(later)

        yield Plot(
            "forgetting",
            "Forgetting of each task",
            f"How the {measure} of each task has changed since it was learned, in percentage "
            "points, over the number of tasks learned since. Below zero is forgetting.",
            change,
        )
    if len(seen.after) > 1:

        def together(axes: Axes) -> int:
            axes.plot(list(seen.after.values()), color=COLOURS[0], marker="o")
            at_least(axes, _SPAN)
            axes.set_ylabel("accuracy in percent")
            name_rows(axes, list(seen.after))
            return 0

        yield Plot(
            "class_incremental",
            "All classes seen so far",
            "Accuracy in percent of the images of all tasks learned so far, each classified among "
            "the classes of all of them (class-incremental).",
            together,
        )


def _of_history(history: Sequence[StepRecord]) -> Iterator[Plot]:
    if len(history) < 2:
        return
    steps = [record.total for record in history]
    terms = list(dict.fromkeys(name for record in history for name in record.losses))

    def losses(axes: Axes) -> int:
        total = [sum(record.losses.values()) for record in history]
        axes.plot(steps, total, color=TEXT, linewidth=1.2, label="total")
        for number, name in enumerate(terms):
            colour, dash = look(number)
            values = [record.losses.get(name, np.nan) or np.nan for record in history]
            label = entry(name.removesuffix("_loss"))
            axes.plot(steps, values, color=colour, linestyle=dash, label=label)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, _LOWEST * max(total)) if max(total) > 0 else low, high)
        plain_log(axes)
        axes.set_ylabel("loss (logarithmic)")
        mark_tasks(axes, history)
        return 1 + len(terms)

    yield Plot(
        "losses",
        "Loss by term",
        "The weighted terms of the loss and their total over the steps of the run, on a "
        "logarithmic axis of four decades at most. Vertical lines are the starts of tasks.",
        losses,
    )
    yield from _of_teachers([record for record in history if record.teacher_weights])
    drifting = [record for record in history if record.prototype_drift]
    if len(drifting) > 1:

        def drift(axes: Axes) -> int:
            for number, name in enumerate(("mean", "max")):
                values = [record.prototype_drift.get(name, np.nan) for record in drifting]
                _broken(axes, drifting, values, COLOURS[number], label=f"{name} over classes")
            axes.set_ylabel("cosine distance")
            mark_tasks(axes, drifting)
            return 2

        yield Plot(
            "prototype_drift",
            "Drift of the prototypes",
            "Cosine distance of the student's prototypes from those at the start of the task, the "
            "mean and the largest over its classes, over the steps of the run.",
            drift,
        )
    yield from _of_time(history)


def _of_teachers(history: Sequence[StepRecord]) -> Iterator[Plot]:
    if len(history) < 2 or all(_alike(record) for record in history):
        return
    names = list(history[0].teacher_weights)
    middles = (np.arange(BINS) + 0.5) / BINS

    def over_time(axes: Axes) -> int:
        shares = []
        for name in names:
            counts = np.array([record.teacher_weights.get(name, [0] * BINS) for record in history])
            shares.append(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
        # The weights of a sample add up to 1, and those of the middles of their bins nearly so.
        together = np.maximum(sum(share @ middles for share in shares), 1e-9)
        for number, (name, share) in enumerate(zip(names, shares, strict=True)):
            low, high = (
                middles[np.argmax(share.cumsum(axis=1) >= q, axis=1)] for q in (0.1, 0.9 - 1e-9)
            )
            steps = [record.total for record in history]
            axes.fill_between(steps, low, high, color=COLOURS[number], alpha=0.2, linewidth=0)
            _broken(axes, history, share @ middles / together, COLOURS[number], label=name)
        axes.set_ylim(0, 1)
        axes.set_ylabel("weight")
        mark_tasks(axes, history)
        return len(names)

    yield Plot(
        "teacher_weights",
        "Weights of the teachers over time",
        "The mean weight of each teacher over the samples of a batch, and a band that holds the "
        "middle 80 percent of the samples, over the steps of the run.",
        over_time,
    )
    tasks = list(dict.fromkeys(record.task for record in history))

    def over_samples(axes: Axes) -> int:
        edges = np.arange(BINS + 1) / BINS
        for place, task in enumerate(reversed(tasks)):
            counts = np.zeros(BINS)
            for record in history:
                if record.task == task:
                    counts += record.teacher_weights.get(names[-1], [0] * BINS)
            heights = 0.9 * counts / max(counts.max(), 1)
            colour = COLOURS[len(names) - 1]
            axes.stairs(place + heights, edges, baseline=place, fill=True, color=colour)
        axes.set_yticks(range(len(tasks)), [short(task) for task in reversed(tasks)])
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"weight of the teacher {names[-1]}")
        return 0

    yield Plot(
        "teacher_samples",
        f"Weights of the teacher {names[-1]} over samples",
        f"For each task, how often samples of the logged steps gave the teacher {names[-1]} a "
        "weight from 0 to 1. The highest bar of each task has the same height.",
        over_samples,
    )


def _alike(record: StepRecord) -> bool:
    # Whether every sample gave all teachers the same weight, so that there is nothing to see.
    place = min(BINS // len(record.teacher_weights), BINS - 1)
    return all(counts[place] == sum(counts) for counts in record.teacher_weights.values())


def _of_time(history: Sequence[StepRecord]) -> Iterator[Plot]:
    of_task: dict[str, list[StepRecord]] = {}
    for record in history:
        of_task.setdefault(record.task, []).append(record)
    timed = {task: mean for task, of in of_task.items() if (mean := mean_seconds(of))}
    if timed:

        def parts(axes: Axes) -> int:
            tasks = list(timed)
            names = list(timed[tasks[0]])
            left = np.zeros(len(tasks))
            for number, name in enumerate(names):
                took = [1000 * timed[task].get(name, 0.0) for task in tasks]
                axes.barh(range(len(tasks)), took, left=left, color=COLOURS[number], label=name)
                left += took
            axes.set_yticks(range(len(tasks)), [short(task) for task in tasks])
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_xlabel("milliseconds a step")
            return len(names)

        yield Plot(
            "step_time",
            "Time of a step by part",
            "Mean milliseconds of a step of each task: waiting for images, features with losses "
            "and their gradients, the update of the weights, and the rest, such as saves.",
            parts,
        )

    def speed(axes: Axes) -> int:
        axes.plot([r.total for r in history], [r.images_per_second for r in history], COLOURS[0])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("images per second")
        mark_tasks(axes, history)
        return 0

    yield Plot("speed", "Speed", "Training images per second at the logged steps.", speed)
    known = [record for record in history if record.memory_mib is not None]
    if len(known) > 1:

        def memory(axes: Axes) -> int:
            axes.plot([r.total for r in known], [r.memory_mib or 0.0 for r in known], COLOURS[0])
            axes.set_ylim(bottom=0)
            axes.set_ylabel("MiB")
            mark_tasks(axes, known)
            return 0

        yield Plot("memory", "Memory", "The largest memory in use so far, in MiB.", memory)


def _broken(
    axes: Axes, history: Sequence[StepRecord], values: Sequence[float], colour: str, label: str
) -> None:
    # A curve that starts anew with each task.
    xs: list[float] = []
    ys: list[float] = []
    for place, (record, value) in enumerate(zip(history, values, strict=True)):
        if place and record.index != history[place - 1].index:
            xs.append(record.total)
            ys.append(np.nan)
        xs.append(record.total)
        ys.append(value)
    axes.plot(xs, ys, color=colour, label=label)


def at_least(axes: Axes, span: float) -> None:
    """Show percentages over a range of so many points or more: a small change looks small."""
    low, high = axes.get_ylim()
    if high - low < span:
        middle = min(max((low + high) / 2, span / 2), 100 - span / 2)
        axes.set_ylim(middle - span / 2, middle + span / 2)


def mark_tasks(axes: Axes, history: Sequence[StepRecord]) -> None:
    """Label the axis of x as steps, with a line where a task starts."""
    starts = {r.index: r.total for r in reversed(history)}
    for index, start in sorted(starts.items()):
        if index != history[0].index:
            axes.axvline(start, color=DIM, alpha=0.5, linewidth=0.8)
    axes.set_xlabel("step")
    axes.margins(x=0.01)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a matrix along the axis of x."""
    shown = [short(name) for name in names]
    turned = sum(map(len, shown)) > 45
    axes.set_xticks(range(len(names)), shown, rotation=35 if turned else 0,
                    ha="right" if turned else "center", rotation_mode="anchor")  # fmt: skip
    axes.set_xlabel("after")


def _whole_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def short(name: str) -> str:
    """A name that fits an axis."""
    return entry(name, 14).lstrip(" ")
