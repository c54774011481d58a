"""Dependencies run downwards only: the table of rooms in CONTRIBUTING.md, from the top."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT


def rooms() -> list[list[str]]:
    """What each row of the table names."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("\n| room |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    return [re.findall(r"`([^`]+)`", row) for row in rows]


def row_of(file: str, rows: list[list[str]]) -> int:
    """The row of a file, which is that of the longest name that fits."""
    fits = {
        len(name): number
        for number, names in enumerate(rows)
        for name in names
        if file == name or (name.endswith("/") and file.startswith(name))
    }
    assert fits, f"{file} is in no room of CONTRIBUTING.md"
    return fits[max(fits)]


def imported(file: Path) -> Iterator[str]:
    """The files that a file imports of the package, at any level of its code."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            # The version is all that modules take of the package that they are in.
            if not name.startswith("mulki.") or name == "mulki.__version__":
                continue
            parts = name.removeprefix("mulki.").split(".")
            for length in range(len(parts), -1, -1):
                path = "/".join(parts[:length])
                found = [f"{path}.py", f"{path}/__init__.py".lstrip("/")]
                root = ROOT if parts[0] == "kernels" else ROOT / "mulki"
                if there := [each for each in found if (root / each).is_file()]:
                    yield there[0]
                    break


def test_rooms_depend_downwards_only() -> None:
    rows = rooms()
    sources = [(ROOT / "mulki", file) for file in (ROOT / "mulki").rglob("*.py")]
    sources += [(ROOT, file) for file in (ROOT / "kernels").glob("*.py")]
    assert len(rows) > 10 and len(sources) > 100
    upwards = [
        f"{inside} -> {other}"
        for root, file in sources
        for inside in [file.relative_to(root).as_posix()]
        for other in imported(file)
        if row_of(other, rows) < row_of(inside, rows)
    ]
    assert upwards == []
