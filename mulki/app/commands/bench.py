"""``mulki bench``: time and memory of the operators, and what a CSV of them says."""

from __future__ import annotations

import argparse

from mulki.app.commands import completion
from mulki.app.commands.parsing import Parser, add_options, with_hyphens

_EXAMPLES = """Every point is verified against float64 first; status 1 if one failed.

examples:
  mulki bench --quick                             a few small shapes in a minute
  mulki bench --ops dual_teacher_kl --shapes 2048x345x768 512x1000
                                                  shapes of your own
  mulki bench --output ops.csv                    all shapes, kept
  mulki bench table ops.csv                       as Markdown
  mulki bench plot ops.csv figures                as figures and a page
"""


def bench(argv: list[str]) -> int:
    """Run the command with these arguments; return its exit status.

    Raises:
        InputError: bad arguments, or a file that is no CSV of this benchmark.
    """
    from mulki.bench.cases import MODES
    from mulki.bench.report import markdown, read_rows
    from mulki.bench.run import BenchOptions, run
    from mulki.choices.options import convert

    if argv[:1] == ["table"]:
        parser = Parser(prog="mulki bench table", description="Markdown tables from a CSV")
        parser.add_argument("file", metavar="CSV", help="as mulki bench --output writes it")
        print(markdown(read_rows(parser.parse_args(argv[1:]).file)), end="")
        return 0
    if argv[:1] == ["plot"]:
        from mulki.bench.plots import plot

        parser = Parser(
            prog="mulki bench plot",
            description="Figures from a CSV as PNG and SVG, and on one page",
        )
        parser.add_argument("file", metavar="CSV", help="as mulki bench --output writes it")
        parser.add_argument("folder", metavar="FOLDER", help="where the figures go")
        parser.add_argument(
            "--mode", default="both", choices=MODES, help="what is drawn (default: both)"
        )
        arguments = parser.parse_args(argv[1:])
        made = plot(read_rows(arguments.file), arguments.folder, arguments.mode)
        print(f"{made[0]}, with {len(made) - 1} files beside it")
        return 0
    parser = Parser(
        prog="mulki bench",
        usage="mulki bench [--OPTION VALUE ...]; bench table CSV; bench plot CSV FOLDER",
        description="Time and memory of the operators",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser.add_argument_group("bench"), BenchOptions)
    if completion.is_asked():
        parser.add_argument("words", nargs="?", choices=("table", "plot"))
    given = vars(parser.parse_args(with_hyphens(argv)))
    options = convert(BenchOptions, {k: v for k, v in given.items() if v is not None})
    return run(BenchOptions(**options))
