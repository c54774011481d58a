"""A comparison of runs as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mulki.report.comparison.groups import TITLES, Comparison
from mulki.report.comparison.orders import over_orders
from mulki.report.tables import column_blocks, recall_note
from mulki.runs.intervals import Difference

#: Characters in a line where the output is no terminal.
WIDTH = 80

#: What the numbers are.
LEGEND = "in percent: mean ± half of its 95 % interval over seeds; difference [95 % interval]"

# More characters than any table has.
_WIDE = 10_000
# Names of rows are cut into lines of at least so many, and the last column into lines of so many.
_LEAST_LABEL, _LEAST_WORDS = 20, 12

# The name of a row and its cells.
_Row = tuple[str, Sequence[str]]


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

    def show(title: str, head: Sequence[str], rows: Sequence[_Row]) -> None:
        lines.print(Text(title, style="bold"))
        for table in _tables(width, head, rows):
            tables.print(table, "", sep="\n")

    for section in comparison.sections:
        means = [
            (group.label, (*_means(group.means), str(len(group.runs)), group.uses))
            for group in section.groups
        ]
        show(section.name, ("runs", "uses"), means)
        if section.differences:
            less = [
                (each.label, (*_differences(each.metrics), str(each.pairs), each.over))
                for each in section.differences
            ]
            show(f"less {section.baseline}", ("pairs", "interval over"), less)
        if section.captions:
            lines.print(Text(recall_note(section.captions)), "", sep="\n")
    rows = []
    for each in over_orders(comparison.sections):
        rows.append((each.label, (*_means(each.means), str(each.orders))))
        if each.baseline is not None:
            label = f"{each.label} less {each.baseline}"
            rows.append((label, (*_differences(each.differences), str(each.compared))))
    if rows:
        show("over orders, each with the mean of its seeds", ("orders",), rows)
    lines.print(Text(LEGEND, style="dim"))
    for warning in comparison.warnings:
        # In one line, for it may name a path.
        lines.print(Text(f"warning: {warning}"), soft_wrap=True)


def _means(of: Mapping[str, tuple[float, float | None]]) -> list[str]:
    return [mean_text(*of[name]) if name in of else "-" for name in TITLES]


def _differences(of: Mapping[str, Difference]) -> list[str]:
    return [difference_text(of[name]) if name in of else "-" for name in TITLES]


def _tables(width: int, about: Sequence[str], rows: Sequence[_Row]) -> Iterator[Table]:
    # Each with all rows and some of the columns; the last column alone holds words.
    head = (*TITLES.values(), *about)
    labels, cells = zip(*rows, strict=True)
    columns = list(zip(head, *cells, strict=True))
    label = min(max(map(cell_len, labels)), max(_LEAST_LABEL, width // 3))
    # Behind a column there are a space and, but for the last one, the table's own.
    room = width - label - 1
    widths = [max(map(cell_len, column)) for column in columns]
    widths[-1] = min(widths[-1], max(room - 2, _LEAST_WORDS))
    for block in column_blocks([each + 1 for each in widths], room):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column(width=label)
        for (title, *_), each in zip(columns[block], widths[block], strict=True):
            table.add_column(title, width=each, justify="right")
        for name, *shown in zip(labels, *(column[1:] for column in columns[block]), strict=True):
            table.add_row(Text(name, overflow="fold"), *map(Text, shown))
        yield table


def mean_text(middle: float, half: float | None) -> str:
    """A mean, and half of its interval where it has one."""
    return f"{middle:.2f}" if half is None else f"{middle:.2f} ± {half:.2f}"


def difference_text(of: Difference) -> str:
    """A difference with its sign, and its interval where it has one."""
    if of.low is None or of.high is None:
        return f"{of.value:+.2f}"
    return f"{of.value:+.2f} [{of.low:+.2f}, {of.high:+.2f}]"
