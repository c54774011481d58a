"""The report on compiled kernels: a CSV of all entries, and Markdown from that."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import triton
from triton import knobs

from benchmarks.kernels.compiled import Compiled
from benchmarks.kernels.limits import SHARED, multiplies
from mulki.kernels.entries import NUMBERS, Entry, entries

HERE = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
_WORDS = ("architecture", "numbers", "operator", "kernel", "tile", "identity", "instructions")
INTRODUCTION = """\
# The Triton kernels, compiled

Every kernel and tile, compiled ahead of time for four architectures, without a GPU: nothing here is
a time. Made by `python -m benchmarks.kernels`, which ends with an error where an entry breaks a
limit of `limits.py`; tests compile a part of it again and compare. `compiled.csv` beside this file
has a line per entry.

- An entry is a kernel as one operator launches it: its tile, and what else is compiled in (which
  arguments are there, what divides by 16, how many parts). Two teachers, D of 512 and 1024.
- Numbers: operands in bf16 and fp16; in float32 as `fp32` (strict: tf32x3 on NVIDIA, float32 on
  AMD), `tf32` and `ieee` (on NVIDIA without tensor cores). Accumulators are float32 throughout.
- Registers are those of a thread (AMD: vector registers). Stack is a thread's memory in bytes, to
  which registers spill. Shared is that of a program in bytes; tensor memory in columns, of which a
  multiprocessor has 512.
- Instructions are those of tensor cores, without the modifiers that all of them have.
"""


def listed() -> list[Entry]:
    """The entries of the report."""
    return [
        entry
        for numbers in NUMBERS
        for architecture in ARCHITECTURES
        for entry in entries(architecture, numbers, full=True)
    ]


def compilers() -> str:
    """The versions that figures depend on."""
    old, new = knobs.nvidia.ptxas.version, knobs.nvidia.ptxas_blackwell.version
    return f"Triton {triton.__version__} (for gfx942 its own LLVM); ptxas {old} and {new}"


def write(rows: Sequence[Compiled], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(Compiled)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Compiled]:
    with path.open(newline="") as file:
        return [Compiled(**_parsed(row)) for row in csv.DictReader(file)]


def _parsed(row: dict[str, str]) -> dict[str, object]:
    return {
        name: value if name in _WORDS else int(value) if value else None
        for name, value in row.items()
    }


def render(rows: Sequence[Compiled], versions: str) -> str:
    return "\n".join(
        [
            INTRODUCTION,
            f"{versions}.",
            "",
            "## The most that any entry takes",
            "",
            *_summary(rows),
            "",
            "## Entries with a stack",
            "",
            *_with_stack(rows),
            "",
            "## Tiles in bf16",
            "",
            "The most over operators, and over what else is compiled in.",
            "",
            *_tiles([row for row in rows if row.numbers == "bf16"]),
            "",
        ]
    )


def _summary(rows: Sequence[Compiled]) -> Iterable[str]:
    names = "| architecture | numbers | entries | registers | stack | with a stack | shared | limit"
    yield f"{names} | tensor memory | instructions |"
    yield "| --- | --- |" + " ---: |" * 7 + " --- |"
    for architecture in ARCHITECTURES:
        for numbers in NUMBERS:
            part = [r for r in rows if (r.architecture, r.numbers) == (architecture, numbers)]
            cells = [
                len(part),
                max(row.registers for row in part),
                max(row.stack for row in part),
                sum(row.stack > 0 for row in part),
                max(row.shared for row in part),
                SHARED[architecture],
                max(row.tensor_memory for row in part),
                ", ".join(sorted({kind for row in part for kind in kinds(row)})) or "none",
            ]
            yield f"| {architecture} | {numbers} | {' | '.join(map(str, cells))} |"


def kinds(row: Compiled) -> list[str]:
    """The instructions without their shapes, which may differ with the tile."""
    names = [name.split(" ", 1)[1] for name in row.instructions.split("; ") if name]
    return sorted({re.sub(r"\bm64n\d+(?=k)", "m64n*", name) for name in names})


def _with_stack(rows: Sequence[Compiled]) -> Iterable[str]:
    names = ("architecture", "numbers", "operator", "kernel", "tile", "warps", "stages")
    names = (*names, "registers", "stack")
    yield f"| {' | '.join(names)} |"
    yield "|" + " --- |" * 5 + " ---: |" * 4
    for row in rows:
        if row.stack:
            yield f"| {' | '.join(str(getattr(row, name)) for name in names)} |"


def _tiles(rows: Sequence[Compiled]) -> Iterable[str]:
    yield (
        "| architecture | kernel | tile | warps | stages | registers | stack | shared "
        "| tensor memory | instructions |"
    )
    yield "| --- | --- | --- |" + " ---: |" * 6 + " --- |"
    groups: dict[tuple[str, str, str, int, int], list[Compiled]] = {}
    for row in rows:
        if multiplies(row):
            key = row.architecture, row.kernel, row.tile, row.warps, row.stages
            groups.setdefault(key, []).append(row)
    for key, group in groups.items():
        most = [
            max(getattr(row, name) for row in group)
            for name in ("registers", "stack", "shared", "tensor_memory")
        ]
        told = ", ".join(sorted({kind for row in group for kind in kinds(row)}))
        yield f"| {' | '.join(map(str, [*key, *most]))} | {told} |"
