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


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table of some columns.

    Args:
        columns: from a key of the rows to its header, with its format behind a colon if it is a
            number: ``{"growth_mib": "growth, MiB:.1f"}``.
    """
    heads = {key: text.partition(":") for key, text in columns.items()}
    lines = [_line(head for head, _, _ in heads.values())]
    lines.append(_line("---:" if form else "---" for _, _, form in heads.values()))
    for row in rows:
        lines.append(_line(_shown(row.get(key), form) for key, (_, _, form) in heads.items()))
    return "\n".join(lines)


def _line(cells: object) -> str:
    return f"| {' | '.join(cells)} |"  # type: ignore[arg-type]


def _shown(value: Cell, form: str) -> str:
    if value is None or value == "":
        return "-"
    return format(value, form) if form else str(value)


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


def show(rows: Sequence[Row], columns: Mapping[str, str], output: str | None, device: str) -> None:
    """Print a table, and append its rows to a CSV file where one is given."""
    print(markdown(rows, columns), flush=True)
    if output:
        write_csv(output, rows, device)


def write_csv(path: str | Path, rows: Sequence[Row], device: str) -> None:
    """Append rows, each with the machine's columns.

    Raises:
        InputError: the file cannot be written, or holds other columns.
    """
    machine = describe_machine(device)
    lines = [dict(**row, **machine) for row in rows]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    path = Path(path)
    try:
        new = not path.exists() or path.stat().st_size == 0
        if not new:
            with path.open(newline="", encoding="utf-8") as file:
                found = next(csv.reader(file), [])
            if found != columns:
                raise InputError(f"--output {path}: holds other columns; name another file")
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if new:
                writer.writeheader()
            writer.writerows(lines)
    except OSError as error:
        raise InputError(
            f"--output {path}: {error.strerror}; name a file in a folder that exists"
        ) from None
