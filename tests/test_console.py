from __future__ import annotations

import io
import re

from rich.live import Live
from rich.table import Table
from rich.text import Text

from mulki.console import Console

HOSTILE = "\x1b[31mowl\a"


def table() -> Table:
    shown = Table("name")
    shown.add_row(Text(HOSTILE))
    return shown


def test_a_name_is_escaped_and_a_line_is_not() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80)
    console.print(HOSTILE, Text(HOSTILE, style="bold"), table(), sep="\n", markup=False)
    assert "\x1b" not in file.getvalue() and "\a" not in file.getvalue()
    assert file.getvalue().count(r"\x1b[31mowl") == 2
    # rich gives a cell the width of the name as it was, and cuts it off there.
    assert file.getvalue().count(r"\x1b[31") == 3


def test_colours_and_moves_of_the_cursor_stay() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard")
    with Live(table(), console=console, auto_refresh=False) as live:
        live.refresh()
    console.print(Text(HOSTILE, style="bold red"))
    written = file.getvalue()
    assert "\x1b[1;31m" in written and re.search(r"\x1b\[\d*A", written)
    assert "\x1b[31mowl" not in written
