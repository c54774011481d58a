from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from mulki.report import read_contents
from mulki.report.figures import plots, thinned
from mulki.runs.history import BINS
from mulki.runs.metrics import AccuracyMatrix, ClassIncremental
from tests.report.report_helpers import record

ALL = {
    "accuracy",
    "forgetting",
    "class_incremental",
    "losses",
    "teacher_weights",
    "teacher_samples",
    "prototype_drift",
    "step_time",
    "speed",
    "memory",
}

pytestmark = pytest.mark.drawn


def test_figures_of_a_whole_run(whole: Path) -> None:
    found = plots(read_contents(whole))
    assert {plot.name for plot in found} == ALL
    ids: list[str] = []
    for plot in found:
        assert plot.title and plot.text.endswith(".")
        ids += re.findall(r'\bid="([^"]*)"', plot.svg())
    assert len(ids) == len(set(ids))


def test_a_slow_first_step_is_one_of_the_steps(whole: Path) -> None:
    first, last = record("digits", 0, 1, 10), record("digits", 0, 10, 10)
    history = [replace(first, seconds={"loading": 1.01}), replace(last, seconds={"loading": 0.01})]
    (plot,) = (p for p in plots(replace(read_contents(whole), history=history))
               if p.name == "step_time")  # fmt: skip
    axes = Figure().subplots()
    plot.draw(axes)
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([110])


def test_a_term_that_begins_near_zero_leaves_room_for_the_others(whole: Path) -> None:
    history = [replace(record("digits", 0, step, 9), losses={"ce_loss": 2.0, "x_loss": 10.0**-step})
               for step in range(1, 10)]  # fmt: skip
    (plot,) = (p for p in plots(replace(read_contents(whole), history=history))
               if p.name == "losses")  # fmt: skip
    axes = Figure().subplots()
    plot.draw(axes)
    low, high = axes.get_ylim()
    assert 1e-4 < low < 1e-3 and high < 10
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert shown == pytest.approx([0.001, 0.01, 0.1, 1.0])


def test_weights_of_the_teachers_add_up_to_one(whole: Path) -> None:
    # Almost all samples weigh both alike, and 0.5 is at the edge of a bin.
    half = [0] * (BINS // 2) + [8] + [0] * (BINS - BINS // 2 - 1)
    alike = {"zero_shot": half, "previous": half}
    history = [replace(record("digits", 0, step, 3), teacher_weights=alike) for step in (1, 2, 3)]
    # Where all do, as with the gate uniform, there is nothing to see.
    names = {plot.name for plot in plots(replace(read_contents(whole), history=history))}
    assert not {name for name in names if name.startswith("teacher_")} and "losses" in names
    apart = {"zero_shot": [8, *half[1:]], "previous": [*half[:-1], 8]}
    history.append(replace(record("digits", 0, 3, 3), teacher_weights=apart))
    (plot,) = (p for p in plots(replace(read_contents(whole), history=history))
               if p.name == "teacher_weights")  # fmt: skip
    axes = Figure().subplots()
    plot.draw(axes)
    for line in axes.lines:
        assert list(line.get_ydata())[:3] == pytest.approx([0.5, 0.5, 0.5])


def test_a_name_with_an_underscore_is_in_the_legend(whole: Path) -> None:
    contents = read_contents(whole)
    matrix = AccuracyMatrix(("_a", "b"), ("_a", "b"), ((1.0, 2.0), (3.0, 4.0)))
    data = replace(contents.data, matrix=matrix)
    for plot in plots(replace(contents, history=[], data=data))[:2]:
        assert re.search(r">\s*_a<", plot.svg())


def test_figures_of_what_there_is(whole: Path) -> None:
    contents = read_contents(whole)
    nothing = replace(
        contents.data, matrix=AccuracyMatrix(()), class_incremental=ClassIncremental({})
    )
    assert plots(replace(contents, history=[], data=nothing)) == []
    few = [replace(r, teacher_weights={}, prototype_drift={}, memory_mib=None, seconds={})
           for r in contents.history]  # fmt: skip
    names = {plot.name for plot in plots(replace(contents, history=few))}
    assert names == {"accuracy", "forgetting", "class_incremental", "losses", "speed"}
    one = plots(replace(contents, history=contents.history[:1]))
    assert {plot.name for plot in one} == {"accuracy", "forgetting", "class_incremental"}


@pytest.mark.parametrize("count", [5, 400, 5000])
def test_long_histories_are_thinned(count: int) -> None:
    history = [record(f"t{index}", index, step, count) for index in range(3)
               for step in range(1, count + 1)]  # fmt: skip
    found = thinned(history)
    assert len(found) <= 420
    for index in range(3):
        steps = [r.step for r in found if r.index == index]
        assert steps[0] == 1 and steps[-1] == count and steps == sorted(set(steps))


def test_a_small_change_does_not_look_large(whole: Path) -> None:
    contents = read_contents(whole)
    for low, high in ((20.25, 21.75), (0.0, 1.0), (99.0, 100.0), (10.0, 90.0)):
        seen = ClassIncremental({"digits": low, "flags": high})
        (plot,) = (
            each
            for each in plots(
                replace(contents, data=replace(contents.data, class_incremental=seen))
            )
            if each.name == "class_incremental"
        )
        axes = Figure().subplots()
        plot.draw(axes)
        bottom, top = axes.get_ylim()
        assert top - bottom >= 20 - 1e-9 and bottom <= low and high <= top
        assert bottom >= -5 and top <= 105
