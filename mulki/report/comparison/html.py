"""A comparison of runs as one page that needs no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mulki.errors import counted
from mulki.report.comparison.figures import SectionPlots, section_plots
from mulki.report.comparison.groups import TITLES, Comparison, Section, metrics_shown
from mulki.report.comparison.tables import Row, difference_rows, mean_rows, order_rows
from mulki.report.pages import page_file, render
from mulki.report.plot import Plot
from mulki.report.tables import recall_note
from mulki.runs.metrics import DEFINITIONS, NOTATION


def render_comparison(comparison: Comparison) -> str:
    """Return the page."""
    sections = comparison.sections
    runs = [run for section in sections for group in section.groups for run in group.runs]
    labels = dict.fromkeys(group.label for section in sections for group in section.groups)
    sequences = len({frozenset(section.tasks) for section in sections})
    metrics = metrics_shown(sections)
    return render(
        page_file("comparison.html"),
        title="Comparison of runs",
        facts=[
            counted(len(runs), "run"),
            counted(len(labels), "group"),
            *([f"{sequences} sequences"] if sequences > 1 else []),
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
