"""``mulki run`` with several seeds, orders or methods: a grid of runs, and what it comes to."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from mulki.app.commands.parsing import Once, Parser
from mulki.choices.options import whole_number
from mulki.console import Console
from mulki.distributed.torchrun import is_first
from mulki.errors import InputError
from mulki.files import write_atomic
from mulki.report.comparison import html
from mulki.report.comparison.compare import GRID_FILES, compare
from mulki.report.comparison.tables import WIDTH, print_comparison
from mulki.train.config.presets import method_of
from mulki.train.config.run_config import RunConfig
from mulki.train.grid import Cell, plan, run_cells

# Each list of a grid, with the option of a run that it stands for and its help.
LISTS = {
    "methods": (
        "method",
        "several methods, each at its preset; an option is for those that have it",
    ),
    "orders": ("order", "several orders"),
    "seeds": ("seed", "several seeds"),
}
#: The options of a grid.
OPTIONS = (*LISTS, "jobs")


def add_grid_options(parser: Parser, *, hidden: bool = False) -> None:
    """Add the options of a grid to those of ``mulki run``.

    Args:
        parser: that of the command.
        hidden: the help leaves them out, for a command that only says why it does not take them.
    """
    group = parser.add_argument_group("several runs, in <logs>/<name>/; what is there is kept")
    for name, (_, text) in LISTS.items():
        text = argparse.SUPPRESS if hidden else text
        group.add_argument(f"--{name}", nargs="+", action=Once, metavar=name.upper(), help=text)
    text = argparse.SUPPRESS if hidden else "runs at a time (default: 1)"
    group.add_argument("--jobs", metavar="N", help=text)


def check_lists(given: Mapping[str, Any]) -> None:
    """Raise an InputError for an option that is given both once and as a list."""
    for several, (one, _) in LISTS.items():
        if several in given and one in given:
            raise InputError(f"--{one}: got it beside --{several}; pass one of the two")


def is_grid(given: Mapping[str, Any]) -> bool:
    """Whether several runs are asked for."""
    return any(name in given for name in OPTIONS)


def run_grid(given: Mapping[str, Any], console: Console) -> None:
    """Make the runs of a grid, print what they come to, and write it beside them.

    ``comparison.html``, ``comparison.json`` and ``comparison.txt`` have means, intervals and
    differences from the first method.

    Args:
        given: options of the runs and of the grid; text, as the command line has them.
        console: where the comparison is printed.

    Raises:
        InputError: bad options, a folder of another run, or a run that fails.
    """
    options = {name: value for name, value in given.items() if name not in OPTIONS}
    method = options.get("method") or method_of(options.get("preset"))
    cells = plan(
        options,
        methods=_distinct("methods", given.get("methods", [method])),
        orders=_distinct("orders", given.get("orders", [options.get("order", RunConfig.order)])),
        seeds=seeds_of(given.get("seeds", [options.get("seed", "0")])),
    )
    jobs = whole("--jobs", given.get("jobs", 1), 1)
    first = is_first()
    run_cells(cells, jobs, Console(stderr=True, quiet=not first))
    if first:
        write_comparison(cells, console)


def write_comparison(cells: Sequence[Cell], console: Console) -> None:
    """Print what complete runs come to, and write it into the folder that they are in."""
    folder = cells[0].folder.parent
    found = compare([cell.folder for cell in cells], cells[0].settings.run.method)
    print_comparison(found, console)
    text = io.StringIO()
    print_comparison(found, Console(file=text), WIDTH)
    as_text, as_numbers, as_page = (folder / name for name in GRID_FILES)
    write_atomic(as_text, text.getvalue())
    write_atomic(as_numbers, json.dumps(found.to_dict(), indent=2) + "\n")
    write_atomic(as_page, html.render_comparison(found))
    console.print(Text(f"runs: {folder}"), soft_wrap=True)
    console.print(Text(f"open: {as_page}"), soft_wrap=True)


def seeds_of(values: Sequence[Any]) -> list[int]:
    """The seeds of ``--seeds``.

    Raises:
        InputError: one is not a whole number, or is given twice.
    """
    return _distinct("seeds", [whole("--seeds", value, 0) for value in values])


def whole(option: str, value: Any, low: int) -> int:
    """A whole number from `low` on, read from text.

    Raises:
        InputError: the text is no such number.
    """
    text = str(value)
    number = whole_number(text)
    if number is None or number < low:
        raise InputError(f"{option}: got {text!r}, wanted a whole number from {low}")
    return number


def _distinct(name: str, values: Sequence[Any]) -> list[Any]:
    twice = next((value for value in values if list(values).count(value) > 1), None)
    if twice is not None:
        raise InputError(f"--{name}: got {twice} twice; leave one out")
    return list(values)
