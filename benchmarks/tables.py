"""Tables of the benchmarks: Markdown to read, CSV to keep, and the machine they are of."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from mulki.bench.machine import describe_machine, setting_line
from mulki.errors import InputError

Cell = str | float | int | None
Row = Mapping[str, Cell]


def machine_line(device: str) -> str:
    """Versions, hardware and threads."""
    return setting_line(describe_machine(device))


def markdown(rows: Sequence[Row]) -> str:
    """A table with the keys of the first row as columns; numbers have four digits."""

    def shown(value: Cell) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [[*rows[0]], ["---"] * len(rows[0])]
    lines += [[shown(row.get(key)) for key in rows[0]] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parser_with_output(description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--output``, a CSV file that is refused at once where it cannot be written."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=_writable,
        metavar="FILE",
        help="a CSV file to write; one that exists grows",
    )
    return parser


def _writable(path: str) -> str:
    try:
        Path(path).open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{path}: {error.strerror}; name a file in a folder that exists"
        ) from None
    return path


def show(rows: Sequence[Row], output: str | None, device: str) -> None:
    """Print a table, and append its rows to a CSV file where one is given."""
    print(markdown(rows), flush=True)
    if output:
        write_csv(output, rows, device)


def write_csv(path: str | Path, rows: Sequence[Row], device: str) -> None:
    """Append rows, each with the machine's columns.

    Raises:
        InputError: the file holds other columns.
    """
    machine = describe_machine(device)
    lines = [dict(**row, **machine) for row in rows]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with Path(path).open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        found = next(csv.reader(file), None)
        if found not in (None, columns):
            raise InputError(f"--output {path}: holds other columns; name another file")
        writer = csv.DictWriter(file, columns)
        if found is None:
            writer.writeheader()
        writer.writerows(lines)
