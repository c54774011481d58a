"""A comparison of runs as one page that needs no network and no other file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mulki.errors import InputError, counted
from mulki.files import write_atomic
from mulki.report.comparison.figures import SectionPlots, section_plots
from mulki.report.comparison.groups import TITLES, Comparison, Section
from mulki.report.comparison.orders import OverOrders, over_orders
from mulki.report.comparison.tables import LEGEND, difference_text, mean_text
from mulki.report.pages import page_file, render
from mulki.report.plot import Plot
from mulki.report.tables import recall_note
from mulki.runs.intervals import Difference
from mulki.runs.metrics import DEFINITIONS, NOTATION

_MINUS = "\N{MINUS SIGN}"


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
        legend=LEGEND,
        recall_note=recall_note,
        metrics=list(TITLES.values()),
        notation=NOTATION,
        definitions={title: DEFINITIONS[name] for name, title in TITLES.items()},
        orders=[row for each in over_orders(sections) for row in _over(each)],
        sections=[_shown(section, number) for number, section in enumerate(sections, 1)],
        runs=[
            (str(run.path), group.label, str(run.seed), section.name, run.data.fingerprint)
            for section in sections
            for group in section.groups
            for run in group.runs
        ],
    )


@dataclass(frozen=True)
class _Cell:
    text: str
    interval: str = ""  # below it, or the table would be too wide for most screens
    kind: str = ""  # better or worse, where the interval leaves no doubt


@dataclass(frozen=True)
class _Row:
    # A table's row: what it is of, its numbers, and what stands behind them.
    label: str
    cells: list[_Cell]
    about: tuple[str, ...]


@dataclass(frozen=True)
class _Shown:
    section: Section
    means: list[_Row]
    differences: list[_Row]
    plots: SectionPlots
    left_out: int  # tasks without a figure


def _shown(section: Section, number: int) -> _Shown:
    plots = section_plots(section, number)
    return _Shown(
        section,
        [
            _Row(group.label, _means(group.means), (str(len(group.runs)), group.uses))
            for group in section.groups
        ],
        [
            _Row(each.label, _differences(each.metrics), (str(each.pairs), each.over))
            for each in section.differences
        ],
        plots,
        len(section.tasks) - len(plots.tasks),
    )


def _over(each: OverOrders) -> list[_Row]:
    rows = [_Row(each.label, _means(each.means), (str(each.orders),))]
    if each.baseline is not None:
        label = f"{each.label} less {each.baseline}"
        rows.append(_Row(label, _differences(each.differences), (str(each.compared),)))
    return rows


def _means(of: Mapping[str, tuple[float, float | None]]) -> list[_Cell]:
    return [_Cell(_typeset(mean_text(*of[name])) if name in of else "-") for name in TITLES]


def _differences(of: Mapping[str, Difference]) -> list[_Cell]:
    return [_difference(name, of[name]) if name in of else _Cell("-") for name in TITLES]


def _difference(name: str, of: Difference) -> _Cell:
    text, bracket, ends = _typeset(difference_text(of)).partition("[")
    return _Cell(text.strip(), bracket + ends, _kind(name, of))


def _kind(name: str, of: Difference) -> str:
    if of.low is None or of.high is None or of.low <= 0 <= of.high:
        return ""
    # Of forgetting, less is better.
    return "better" if (of.value > 0) != (name == "forgetting") else "worse"


def _typeset(text: str) -> str:
    return text.replace("-", _MINUS)


def figures(comparison: Comparison) -> list[Plot]:
    """All figures of the page, in its order."""
    return [
        plot
        for number, section in enumerate(comparison.sections, 1)
        for plot in section_plots(section, number).all
    ]
