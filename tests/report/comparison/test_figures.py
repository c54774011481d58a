from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mulki.report.comparison.compare import compare
from mulki.report.comparison.figures import section_plots
from mulki.report.plot import Plot
from tests.report.report_helpers import Make, write_whole_run

pytestmark = pytest.mark.drawn


def drawn(plot: Plot) -> Axes:
    axes = Figure().subplots()
    plot.draw(axes)
    return axes


def lines(plot: Plot) -> dict[str, list[float]]:
    return {str(line.get_label()): [*np.asarray(line.get_ydata())] for line in drawn(plot).lines}


def dots(plot: Plot) -> dict[str, float]:
    """Of a figure with one value of each group, the value beside each name."""
    axes = drawn(plot)
    names = [label.get_text() for label in axes.get_yticklabels()]
    values = [np.asarray(line.get_xdata()) for line in axes.lines]
    # Lines have two ends.
    return dict(zip(names, (float(x[0]) for x in values if len(x) == 1), strict=True))


def test_curves_are_means_over_seeds(make: Make) -> None:
    runs = [make(f"{m}{s}", m, s) for m in ("lwf", "mulki") for s in (0, 1)]
    (section,) = compare(runs).sections
    plots = {plot.name.removeprefix("order_3_"): plot for plot in section_plots(section, 3).all}
    matrices = [run.data.matrix for run in section.groups[1].runs]
    mean = np.mean([[m.zero_shot, *m.rows] for m in matrices], axis=0)  # [3 rows, 2 tasks]
    assert lines(plots["learned"])["mulki"] == pytest.approx([mean[1, 0], mean[2].mean()])
    assert dots(plots["later"])["mulki"] == pytest.approx(mean[1, 1] - mean[0, 1])
    assert dots(plots["forgetting"])["mulki"] == pytest.approx(mean[2, 0] - mean[1, 0])
    assert lines(plots["task_02"])["mulki"] == pytest.approx(mean[:, 1])
    seen = [list(run.data.class_incremental.after.values()) for run in section.groups[0].runs]
    assert lines(plots["class_incremental"])["lwf"] == pytest.approx(np.mean(seen, axis=0))
    of = section.differences[0].metrics["last"]
    assert [of.low, of.high] in [
        list(line.get_xdata()) for line in drawn(plots["differences"]).lines
    ]


def test_tasks_not_learned_yet_are_shown_as_what_they_lost(make: Make) -> None:
    tasks = ("a", "b", "c")
    (section,) = compare([make("x", tasks=tasks)]).sections
    plot = next(p for p in section_plots(section, 1).overall if p.name == "order_1_later")
    matrix = section.groups[0].runs[0].data.matrix
    rows, start = np.array(matrix.rows), np.array(matrix.zero_shot)
    assert lines(plot)["mulki"] == pytest.approx(
        [(rows[0] - start)[1:].mean(), rows[1, 2] - start[2]]
    )
    assert drawn(plot).get_ylabel() == "percentage points from zero-shot"


def test_figures_of_captions_are_of_recall(make: Make) -> None:
    (section,) = compare([make("a", captions=("a",))]).sections
    found = section_plots(section, 1)
    assert found.measure == "accuracy or recall@1"
    units = {plot.name: drawn(plot).get_ylabel() for plot in (*found.overall, *found.tasks)}
    assert units["order_1_learned"] == "accuracy or recall@1 in percent"
    assert units["order_1_task_01"] == "recall@1 in percent"
    assert units["order_1_task_02"] == "accuracy in percent"
    assert found.tasks[0].text.startswith("Recall@1 in percent of a after")
    (section,) = compare([make("b", captions=("a", "b"))]).sections
    assert section_plots(section, 1).measure == "recall@1"


def test_losses_are_means_of_the_steps_that_all_seeds_have(tmp_path: Path) -> None:
    runs = [write_whole_run(tmp_path, name=f"r{seed}", seed=seed) for seed in (1, 2)]
    runs.append(write_whole_run(tmp_path, name="other", method="lwf"))
    history = (runs[0] / "history.jsonl").read_text().splitlines()
    (runs[0] / "history.jsonl").write_text("\n".join([*history[1:], "cut off"]))
    (section,) = compare(runs).sections
    plots = section_plots(section, 1)
    assert [plot.title for plot in plots.losses] == ["Total loss", "ce", "text_text"]
    assert [len(y) for label, y in lines(plots.losses[1]).items() if label in ("mulki", "lwf")] == [
        17, 18
    ]  # fmt: skip
    # Two names of the same figure would mix up what they refer to.
    ids = [name for plot in plots.all for name in re.findall(r'\bid="([^"]*)"', plot.svg())]
    assert len(ids) == len(set(ids))


def test_runs_without_losses_or_start_have_the_figures_left(make: Make) -> None:
    (section,) = compare([make("a", "lwf"), make("b")]).sections
    assert section_plots(section, 1).losses == ()
    one = compare([make("c", tasks=("a",))]).sections[0]
    assert [plot.name for plot in section_plots(one, 1).all] == [
        "order_1_learned",
        "order_1_task_01",
    ]
    run = one.groups[0].runs[0]
    matrix = replace(run.data.matrix, zero_shot=None)
    bare = replace(run, data=replace(run.data, matrix=matrix))
    section = replace(one, groups=(replace(one.groups[0], runs=(bare,)),))
    assert dots(section_plots(section, 1).tasks[0]) == {"mulki": matrix.rows[0][0]}


def test_many_tasks_have_the_first_figures_alone(make: Make) -> None:
    names = tuple(f"t{place:02d}" for place in range(25))
    (section,) = compare([make("a", tasks=names, images=3)]).sections
    plots = section_plots(section, 1)
    assert len(plots.tasks) == 20
