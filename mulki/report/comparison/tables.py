"""A comparison of runs as tables: their rows, and how a terminal shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

from mulki.console import Console
from mulki.report.comparison.groups import (
    TITLES,
    Comparison,
    Section,
    metrics_shown,
    over_orders,
)
from mulki.report.tables import folded_tables, recall_note, rounded
from mulki.runs.intervals import Difference

#: Characters in a line where the output is no terminal.
WIDTH = 80

#: What the numbers are.
LEGEND = "in percent: mean ± half of its 95 % interval over seeds; difference [95 % interval]"

# More characters than any table has.
_WIDE = 10_000


@dataclass(frozen=True)
class Cell:
    """A number, its interval, and "better" or "worse" where that leaves no doubt."""

    text: str = "-"
    interval: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".rstrip()


@dataclass(frozen=True)
class Row:
    """What a row is of, a cell for each metric that is shown, and what stands behind them."""

    label: str
    cells: tuple[Cell, ...]
    about: tuple[str, ...]


def mean_rows(section: Section, metrics: Sequence[str]) -> list[Row]:
    """The groups of a section, with their numbers of runs and what they use."""
    return [
        Row(g.label, _means(g.means, metrics), (str(len(g.runs)), g.uses)) for g in section.groups
    ]


def difference_rows(section: Section, metrics: Sequence[str]) -> list[Row]:
    """What groups have more than the baseline, with pairs of runs and what intervals hold."""
    return [
        Row(each.label, _differences(each.metrics, metrics), (str(each.pairs), each.over))
        for each in section.differences
    ]


def order_rows(sections: Sequence[Section], metrics: Sequence[str]) -> list[Row]:
    """Groups over several orders, and their differences, with the numbers of orders."""
    rows, found = [], over_orders(sections)
    several = len({each.sequence for each in found}) > 1
    for each in found:
        label = f"{each.sequence}: {each.label}" if several else each.label
        rows.append(Row(label, _means(each.means, metrics), (str(each.orders),)))
        if each.baseline is not None:
            cells = _differences(each.differences, metrics)
            rows.append(Row(f"{label} less {each.baseline}", cells, (str(each.compared),)))
    return rows


def print_comparison(comparison: Comparison, console: Console, width: int | None = None) -> None:
    """Print the tables. Columns that do not fit follow below, beside the names of their rows again.

    Args:
        comparison: of runs.
        console: where to.
        width: characters in a line; by default those of the terminal, and `WIDTH` where there is
            none. A number is never cut, so a line of one number may be wider.
    """
    if width is None:
        width = console.width if console.is_terminal else WIDTH
    lines = Console(file=console.file, width=width)
    # A table that is too wide for its console would be squeezed into it.
    tables = Console(file=console.file, width=_WIDE)

    def show(title: str, head: Sequence[str], rows: Sequence[Row]) -> None:
        lines.print(Text(title, style="bold"))
        titles = [*(TITLES[name] for name in metrics), *head]
        cells = [(row.label, (*map(str, row.cells), *row.about)) for row in rows]
        for table in folded_tables(width, "", titles, cells):
            tables.print(table, "", sep="\n")

    metrics = metrics_shown(comparison.sections)
    for section in comparison.sections:
        show(section.name, ("runs", "uses"), mean_rows(section, metrics))
        if section.differences:
            rows = difference_rows(section, metrics)
            show(f"less {section.baseline}", ("pairs", "interval over"), rows)
        if section.captions:
            lines.print(Text(recall_note(section.captions)), "", sep="\n")
    if rows := order_rows(comparison.sections, metrics):
        show(
            "over orders, each with the mean of its seeds; intervals over orders", ("orders",), rows
        )
    lines.print(Text(LEGEND, style="dim"))
    for warning in comparison.warnings:
        # In one line, for it may name a path.
        lines.print(Text(f"warning: {warning}"), soft_wrap=True)


def _means(
    of: Mapping[str, tuple[float, float | None]], metrics: Sequence[str]
) -> tuple[Cell, ...]:
    return tuple(_mean(*of[name]) if name in of else Cell() for name in metrics)


def _differences(of: Mapping[str, Difference], metrics: Sequence[str]) -> tuple[Cell, ...]:
    return tuple(_difference(name, of[name]) if name in of else Cell() for name in metrics)


def _difference(name: str, of: Difference) -> Cell:
    value = f"{rounded(of.value):+.2f}"
    if of.low is None or of.high is None:
        return Cell(value)
    # Of forgetting, less is better.
    kind = "better" if (of.value > 0) != name.endswith("forgetting") else "worse"
    interval = f"[{rounded(of.low):+.2f}, {rounded(of.high):+.2f}]"
    return Cell(value, interval, "" if of.low <= 0 <= of.high else kind)


def _mean(middle: float, half: float | None) -> Cell:
    return Cell(f"{rounded(middle):.2f}", "" if half is None else f"± {half:.2f}")
