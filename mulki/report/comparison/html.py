"""A comparison of runs as one page that needs no network and no other file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mulki.errors import InputError, counted
from mulki.files import write_atomic
from mulki.report.comparison.figures import SectionPlots, section_plots
from mulki.report.comparison.groups import TITLES, Comparison, Section, metrics_shown
from mulki.report.comparison.tables import Row, difference_rows, mean_rows, order_rows
from mulki.report.pages import page_file, render
from mulki.report.plot import Plot
from mulki.report.tables import recall_note
from mulki.runs.metrics import DEFINITIONS, NOTATION


def write_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write the page, atomically.

    Args:
        comparison: of runs.
        path: of the file.

    Raises:
        OSError: as ``open`` does.
    """
    write_atomic(path, render_comparison(comparison))


def check_page(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, before the work is done.

    Raises:
        InputError: it is a folder, or its folder is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"--html: {path} is a folder; name a file, as {path / 'comparison.html'}")
    if not path.parent.is_dir():
        raise InputError(f"--html: {path.parent} is no folder; make it, or name another file")


def render_comparison(comparison: Comparison) -> str:
    """Return the page."""
    sections = comparison.sections
    runs = [run for section in sections for group in section.groups for run in group.runs]
    labels = dict.fromkeys(group.label for section in sections for group in section.groups)
    metrics = metrics_shown(sections)
    return render(
        page_file("comparison.html"),
        title="Comparison of runs",
        facts=[
            counted(len(runs), "run"),
            counted(len(labels), "group"),
            counted(len(sections), "order"),
        ],
        unlike=comparison.unlike,
        notes=[line for line in comparison.warnings if line not in comparison.unlike],
        recall_note=recall_note,
        metrics=[TITLES[name] for name in metrics],
        notation=NOTATION,
        definitions={TITLES[name]: DEFINITIONS[name] for name in metrics},
        orders=order_rows(sections, metrics),
        sections=[_shown(section, number, metrics) for number, section in enumerate(sections, 1)],
        runs=[
            (str(run.path), group.label, str(run.seed), section.name, run.data.fingerprint)
            for section in sections
            for group in section.groups
            for run in group.runs
        ],
    )


@dataclass(frozen=True)
class _Shown:
    section: Section
    means: list[Row]
    differences: list[Row]
    plots: SectionPlots
    left_out: int  # tasks without a figure


def _shown(section: Section, number: int, metrics: Sequence[str]) -> _Shown:
    plots = section_plots(section, number)
    left_out = len(section.tasks) - len(plots.tasks)
    rows = mean_rows(section, metrics), difference_rows(section, metrics)
    return _Shown(section, *rows, plots, left_out)


def figures(comparison: Comparison) -> list[Plot]:
    """All figures of the page, in its order."""
    return [
        plot
        for number, section in enumerate(comparison.sections, 1)
        for plot in section_plots(section, number).all
    ]
