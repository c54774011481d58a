"""A comparison of runs as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mulki.intervals import Difference
from mulki.report.comparison import TITLES, Comparison
from mulki.report.orders import OverOrders, over_orders

# More characters than any table has.
_WIDE = 10_000

#: What the numbers are.
LEGEND = "in percent: mean ± half of its 95 % interval over seeds; difference [95 % interval]"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the tables, as wide as they are: a shortened number would be a wrong one."""
    console = Console(file=console.file, width=_WIDE)
    for section in comparison.sections:
        console.print(Text(section.name, style="bold"))
        table = _table("", *TITLES.values(), "runs", "uses")
        for group in section.groups:
            means = group.means
            cells = [mean_text(*means[name]) if name in means else "-" for name in TITLES]
            table.add_row(Text(group.label), *cells, str(len(group.runs)), group.uses)
        console.print(table, "", sep="\n")
        if section.differences:
            console.print(Text(f"less {section.baseline}", style="bold"))
            table = _table("", *TITLES.values(), "pairs", "interval over")
            for against in section.differences:
                cells = [
                    difference_text(against.metrics[name]) if name in against.metrics else "-"
                    for name in TITLES
                ]
                table.add_row(Text(against.label), *cells, str(against.pairs), against.over)
            console.print(table, "", sep="\n")
    _print_orders(over_orders(comparison.sections), console)
    console.print(Text(LEGEND, style="dim"))
    for warning in comparison.warnings:
        console.print(Text(f"warning: {warning}"))


def _print_orders(found: Sequence[OverOrders], console: Console) -> None:
    if not found:
        return
    console.print(Text("over orders, each with the mean of its seeds", style="bold"))
    table = _table("", *TITLES.values(), "orders")
    for each in found:
        means = [mean_text(*each.means[name]) if name in each.means else "-" for name in TITLES]
        table.add_row(Text(each.label), *means, str(each.orders))
        if each.baseline is not None:
            less = [
                difference_text(each.differences[name]) if name in each.differences else "-"
                for name in TITLES
            ]
            table.add_row(Text(f"{each.label} less {each.baseline}"), *less, str(each.compared))
    console.print(table, "", sep="\n")


def _table(label: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(label, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def mean_text(middle: float, half: float | None) -> str:
    """A mean, and half of its interval where it has one."""
    return f"{middle:.2f}" if half is None else f"{middle:.2f} ± {half:.2f}"


def difference_text(of: Difference) -> str:
    """A difference with its sign, and its interval where it has one."""
    if of.low is None or of.high is None:
        return f"{of.value:+.2f}"
    return f"{of.value:+.2f} [{of.low:+.2f}, {of.high:+.2f}]"
