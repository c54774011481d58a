"""The report on compiled kernels: a CSV with a line per variant, and Markdown made from it."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import triton
from triton import knobs

from benchmarks.kernels.ahead_of_time import NUMBER_FORMATS, Variant, variants
from benchmarks.kernels.compiled import Compiled
from benchmarks.kernels.limits import SHARED, multiplies

HERE = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")
_WORDS = ("architecture", "number_format", "operator", "kernel", "tile", "identity", "instructions")
INTRODUCTION = """\
# The Triton kernels, compiled

All variants of the Triton kernels, compiled for five architectures without a GPU. There are no
times here. `python -m benchmarks.kernels` writes this file, and `compiled.csv` with a line per
variant; it ends with an error where a variant breaks a limit of `limits.py`. Tests compile a part
again and compare.

- A variant is a kernel as an operator launches it, with the tile and all else that is a constant of
  the compiled code: which arguments are given, and which are multiples of 16. teacher_kl has two
  teachers; D is 512. In fp16 only kernels that multiply, or are for fp16, are compiled.
- Number format: operands are bf16, fp16 or float32. float32 is multiplied as `fp32` (strict: tf32x3
  on NVIDIA, float32 on AMD), `tf32` or `ieee` (on NVIDIA without tensor cores). Accumulators are
  float32 throughout.
- Registers are per thread (AMD: vector registers). Stack is memory per thread in bytes, where
  spilled registers go. Shared memory is per program in bytes, tensor memory in columns; a
  multiprocessor has 512 columns.
- Instructions are those of tensor cores, without the modifiers that all have.
"""


@functools.cache
def all_variants() -> tuple[Variant, ...]:
    """The variants of the report, in its order."""
    return tuple(
        variant
        for number_format in NUMBER_FORMATS
        for architecture in ARCHITECTURES
        for variant in variants(architecture, number_format)
    )


def compilers() -> str:
    """The versions of the compilers."""
    old, new = knobs.nvidia.ptxas.version, knobs.nvidia.ptxas_blackwell.version
    return (
        f"Triton {triton.__version__} (for gfx942 and gfx1100 its own LLVM); ptxas {old} and {new}"
    )


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
            "## The largest values over all variants",
            "",
            *_summary(rows),
            "",
            "## Variants with a stack",
            "",
            *_with_stack(rows),
            "",
            "## Tiles in bf16",
            "",
            "The largest values over all operators and variants with this tile.",
            "",
            *_tiles([row for row in rows if row.number_format == "bf16"]),
            "",
        ]
    )


def _summary(rows: Sequence[Compiled]) -> Iterable[str]:
    yield (
        "| architecture | number format | variants | registers | stack | with a stack | shared "
        "| limit | tensor memory | instructions |"
    )
    yield "| --- | --- |" + " ---: |" * 7 + " --- |"
    for architecture in ARCHITECTURES:
        for number_format in NUMBER_FORMATS:
            part = [
                r
                for r in rows
                if (r.architecture, r.number_format) == (architecture, number_format)
            ]
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
            yield f"| {architecture} | {number_format} | {' | '.join(map(str, cells))} |"


def kinds(row: Compiled) -> list[str]:
    """The instructions without the part of their shape that differs with the tile."""
    names = [name.split(" ", 1)[1] for name in row.instructions.split("; ") if name]
    return sorted({re.sub(r"\bm64n\d+(?=k)", "m64n*", name) for name in names})


def _with_stack(rows: Sequence[Compiled]) -> Iterable[str]:
    names = ("architecture", "number_format", "operator", "kernel", "tile", "warps", "stages")
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
        instructions = ", ".join(sorted({kind for row in group for kind in kinds(row)}))
        yield f"| {' | '.join(map(str, [*key, *most]))} | {instructions} |"
