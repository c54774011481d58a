"""``mulki compare``: runs side by side, as a table, a page and figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mulki.app.commands.parsing import Parser
from mulki.console import Console
from mulki.errors import InputError
from mulki.files import write_atomic
from mulki.printing import say
from mulki.report.comparison.compare import compare
from mulki.report.comparison.html import figures, render_comparison
from mulki.report.comparison.tables import print_comparison
from mulki.runs.predictions import check_writable


def compare_runs(argv: list[str]) -> int:
    """Run the command with these arguments; return its exit status.

    Raises:
        InputError: bad arguments, or folders that cannot be compared.
    """
    parser = Parser(
        prog="mulki compare", description="Means over seeds and paired differences of runs"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that mulki run has written")
    parser.add_argument(
        "--baseline", metavar="NAME", help="a method or a label (default: that of the first run)"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--html", metavar="FILE", help="write one page with tables and curves")
    parser.add_argument("--figures", metavar="DIR", help="write the curves as PNG and SVG")
    arguments = parser.parse_args(argv)
    if arguments.html is not None:
        check_writable("--html", Path(arguments.html))
    folder = None if arguments.figures is None else Path(arguments.figures)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"--figures: got {folder}, which is a file; pass a folder, or a new path")
    comparison = compare(arguments.runs, arguments.baseline)
    if arguments.json:
        print(json.dumps(comparison.to_dict()))
    else:
        print_comparison(comparison, Console())
    if arguments.html is not None:
        write_atomic(arguments.html, render_comparison(comparison))
        say(f"page: {arguments.html}", sys.stderr)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in figures(comparison):
            plot.write(folder)
        say(f"figures: {folder}", sys.stderr)
    return 0
