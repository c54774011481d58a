"""What every operator takes by count, and in a model of time, beside plain PyTorch.

python -m benchmarks.kernels plan            # a table
python -m benchmarks.kernels plan --json     # an object per operator, shape, width and format
python -m benchmarks.kernels plan --write    # plan.csv and PLAN.md beside this file

A step, forward and backward: the mean of a loss with the gradients of features, prototypes and
scale (and bias), and all that autograd launches; of similarity, both passes with their matrices
given and returned.

No GPU is needed, and none was used: counts come from recorded launches, times from the published
peaks of four GPUs and the assumptions in `cards.py`. "eager" is the loss as it is written in plain
PyTorch, "graph" the same launches in a CUDA graph, "compile" the products of eager with what lies
between them fused, in a graph too, and "library" the least number of products by the library that
torch calls.

`host_us` alone is measured: microseconds of this process that a step takes on tensors of the device
"meta", by Triton's own code for launches up to a driver that does nothing (`host.py`). Products of
the library do nothing, too, so what torch takes to call them is not in it. Calls of an operator
with as many launches differ by the host's work hardly at all, so one of them is measured.

`eager_extra_bytes` are counted as ours are. `compile_extra_bytes` are the logits that "compile"
stores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import targets
from benchmarks.kernels.ahead_of_time import NUMBER_FORMATS
from benchmarks.kernels.cards import CARDS, PYTHON_HOST, TORCH_HOST, seconds
from benchmarks.kernels.counts import OPERATORS, PAIRED, Counts, Work, counts, counts_of_torch
from benchmarks.kernels.host import microseconds_of
from mulki.bench.losses import EAGER
from mulki.kernels.schedule import WHOLE_COLUMNS, padded_operations
from mulki.runs.environment import environment

HERE = Path(__file__).parent
SHAPES = (
    *((64, 100), (64, 1000), (256, 1000), (4096, 1000), (32768, 1000), (65536, 1000)),
    *((4096, 4096), (8192, 8192), (16384, 16384), (65536, 65536)),
)
WIDTHS = (512, 640, 768, 1024, 1280)
WAYS = ("mulki", "mulki graph", "eager", "eager graph", "compile", "library")
INTEGERS = (
    *("n", "p", "d", "k", "launches", "bytes", "l2_bytes"),
    *("extra_bytes", "eager_extra_bytes", "compile_extra_bytes", "host_us"),
)
COLUMNS = ("operator", "n", "p", "d", "k", "numbers", "products", *INTEGERS[4:])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels plan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="renew plan.csv and PLAN.md")
    options = parser.parse_args(argv)
    rows = list(all_rows())
    if options.write:
        write(rows)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(table(rows)))
    return 0


def all_rows() -> Iterator[dict[str, Any]]:
    measured: dict[tuple[str, int], int] = {}
    for operator in OPERATORS:
        for n, p in SHAPES:
            if operator in PAIRED and n != p:
                continue
            for d in WIDTHS:
                for numbers in NUMBER_FORMATS:
                    one = row(operator, n, p, d, numbers)
                    kind = operator, one["launches"]
                    if kind not in measured:
                        measured[kind] = round(microseconds_of(operator, n, p, d, numbers))
                    yield one | {"host_us": measured[kind]}


def row(operator: str, n: int, p: int, d: int, numbers: str) -> dict[str, Any]:
    """What is counted of one call, and modelled seconds by GPU and way of computing it."""
    found, dtype = counts(operator, n, p, d, numbers), NUMBER_FORMATS[numbers][0]
    plain = eager(operator, n, p, d, dtype)
    work = {
        "mulki": (found.work, PYTHON_HOST),
        "eager": (plain.work, TORCH_HOST),
        "compile": (compiled(operator, n, p, d, dtype), 0.0),
        "library": (library(operator, n, p, d, dtype), 0.0),
    }
    work["eager graph"] = work["eager"][0], 0.0
    few = p <= max(WHOLE_COLUMNS.values())  # so that a graph may have other kernels
    in_graph = counts(operator, n, p, d, numbers, in_graph=True) if few else found
    work["mulki graph"] = in_graph.work, 0.0
    return {
        "operator": operator,
        "n": n,
        "p": p,
        "d": d,
        "k": OPERATORS[operator],
        "numbers": numbers,
        "products": round(found.products, 3),
        "launches": found.launches,
        "bytes": found.bytes,
        "l2_bytes": found.l2_bytes,
        "extra_bytes": found.extra_bytes,
        "eager_extra_bytes": plain.extra_bytes,
        "compile_extra_bytes": stored_by_compile(operator, n, p, dtype),
        "seconds": {
            name: {way: seconds(work[way][0], card, numbers, work[way][1]) for way in WAYS}
            for name, card in CARDS.items()
        },
    }


@cache
def eager(operator: str, n: int, p: int, d: int, dtype: torch.dtype) -> Counts:
    """The loss of plain PyTorch, with its backward."""

    def matrix() -> tuple[Tensor, Tensor, Tensor]:
        operands = (torch.empty(rows, d, dtype=dtype, device="meta") for rows in (n, p))
        return *operands, torch.empty((), dtype=dtype, device="meta")

    leaves = [t.requires_grad_() for t in matrix()]
    rest: list[Any] = []
    target = torch.empty(n, dtype=torch.int64, device="meta")
    if OPERATORS[operator]:
        rest = [tuple(matrix() for _ in range(OPERATORS[operator])), target]
    elif operator == "prototype_cross_entropy":
        rest = [target]
    elif operator == "siglip":
        leaves.append(torch.empty((), dtype=dtype, device="meta").requires_grad_())
    upstream = torch.empty(n, p, dtype=dtype, device="meta") if operator == "similarity" else None

    def both() -> Sequence[Tensor]:
        out = _siglip(*leaves) if operator == "siglip" else EAGER[operator](*leaves, *rest)
        return (out, *torch.autograd.grad(out, leaves, upstream))

    return counts_of_torch(both, 2 * n * p * d)


def _siglip(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    # The signs of N = P; here N and P may differ.
    z = scale * x @ w.T + bias
    signs = 2 * torch.eye(*z.shape, dtype=z.dtype, device=z.device) - 1
    return -torch.nn.functional.logsigmoid(signs * z).sum() / x.shape[0]


def library(operator: str, n: int, p: int, d: int, dtype: torch.dtype) -> list[Work]:
    """The least number of products, one launch each."""
    size, k = dtype.itemsize, OPERATORS[operator]
    moved = size * (n * d + p * d + n * p)
    logits, of_x, of_w = (
        Work("library", 2 * n * p * d, padded_operations(*shape), moved, moved)
        for shape in ((n, d, p), (n, p, d), (p, n, d))
    )
    return [logits] * (k + 1) + [of_x, of_w]


def compiled(operator: str, n: int, p: int, d: int, dtype: torch.dtype) -> list[Work]:
    """The products, and kernels between them that read stored logits twice and write each G once.

    As of the others, the upstream gradient is one more launch, where it is not given.
    """
    products = library(operator, n, p, d, dtype)
    if operator == "similarity":
        return products
    directions = 2 if operator in PAIRED else 1  # each has its products
    products = directions * products
    read = stored_by_compile(operator, n, p, dtype)
    moved = (read, read + directions * n * p * dtype.itemsize, 8)
    return [*products, *(Work("torch", 0, 0, one, one) for one in moved)]


def stored_by_compile(operator: str, n: int, p: int, dtype: torch.dtype) -> int:
    """Bytes of the logits that `compiled` stores, of each direction; G may take their place."""
    matrices = 0 if operator == "similarity" else OPERATORS[operator] + 1
    return matrices * (2 if operator in PAIRED else 1) * n * p * dtype.itemsize


def cells(one: dict[str, Any]) -> list[str]:
    counted = [f"{one[name]:g}" if name == "products" else str(one[name]) for name in COLUMNS]
    return counted + [f"{one['seconds'][card][way]:.3g}" for card in CARDS for way in WAYS]


def header() -> list[str]:
    return [*COLUMNS, *(f"{card} {way}" for card in CARDS for way in WAYS)]


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    lines = [header(), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def write(rows: Sequence[dict[str, Any]], folder: Path = HERE) -> None:
    with (folder / "plan.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header(), *map(cells, rows)])
    (folder / "PLAN.md").write_text(render(rows))


def read(path: Path = HERE / "plan.csv") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


INTRODUCTION = """\
# What the Triton kernels take, by count

A step: forward and backward of a public function with gradients of everything, and all that
autograd launches for them; D = 512. **Nothing here was measured on a GPU**: products, launches and
memory are counted, and times are a model of an H100 from its published peaks, the one by which the
kernels choose (`kernels/schedule.py`). For every provider a launch is its products or its bytes,
whichever takes longer, and a gap of 1.5 us; tensors that fit L2 are there. Ours alone are also
charged for programs that do not fill the GPU, and for what programs read from L2 again; and of
torch.compile the extra memory is its stored logits alone. "graph" is the same in a CUDA graph,
where the library multiplies also for few classes; without one a step takes at least 6 us of the
host for each operation of eager, and 12 for each launch of ours, which was not measured. Operands
of several models in one memory (docs/gpu.md) save launches that are counted here.
The library's products are assumed to reach 690e12 operations a second in bfloat16, a share of the
published peak that is not reached with a small D: with float32 results and D = 512 we expect 350 to
450e12. That would slow down whatever multiplies with the library, and torch.compile most.
"MiB" are the bytes that all launches move, "extra MiB" the peak of memory.
"host us" is Python's time for a step like one before it, measured up to a driver that does nothing,
without torch's time for products of the library. Where it is more than "mulki, us", a step takes at
least that long without a graph.
`plan.csv` has five widths, five number formats and four GPUs.
`python -m benchmarks.kernels plan --write` makes both files, and says what the columns are.

Host: {host}.

## Targets

Those of CPUs and of training are in docs/benchmarks.md.

{targets}

Modelled slower than torch.compile by over {slower} %, both in a CUDA graph, in bfloat16:

{shapes}

## All

"""


def host() -> str:
    """The machine on which `host_us` is measured, how busy it is, and versions."""
    found, load = environment(), os.getloadavg()[0]
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "triton"))
    return f"{found['cpu']}, {found['cpu_count']} cores with a load of {load:.1f}; {versions}"


def render(rows: Sequence[dict[str, Any]]) -> str:
    found, shapes = "\n".join(targets.lines(rows)), "\n".join(targets.slower(rows))
    filled = {"targets": found, "slower": targets.SLOWER, "shapes": shapes}
    lines = [INTRODUCTION.format(host=host(), **filled).rstrip(), ""]
    head = ("operator", "N x P", "numbers", "products", "launches", "MiB", "extra MiB", "host us")
    lines.append(f"| {' | '.join((*head, *(f'{way}, us' for way in WAYS)))} |")
    lines.append("| --- | --- | --- |" + " ---: |" * (5 + len(WAYS)))
    for one in rows:
        if one["d"] != WIDTHS[0] or one["numbers"] not in ("bf16", "fp32"):
            continue
        counted = (
            *(f"{one['products']:g}", str(one["launches"])),
            *(f"{one[name] / 2**20:.1f}" for name in ("bytes", "extra_bytes")),
            str(one["host_us"]),
        )
        times = (f"{one['seconds']['H100'][way] * 1e6:.0f}" for way in WAYS)
        named = one["operator"], f"{one['n']} x {one['p']}", one["numbers"]
        lines.append(f"| {' | '.join((*named, *counted, *times))} |")
    return "\n".join(lines) + "\n"
