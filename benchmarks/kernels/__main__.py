"""Counts what a step takes, and writes PLAN.md:    python -m benchmarks.kernels

A step is forward and backward for the mean of a loss with gradients of X, W and scale. Ours and
eager are recorded (`recorded`); of torch.compile the least is counted that it can do, see `_least`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.recorded import Launch, Operation, arguments_of, meta, recorded
from mulki.kernels.lookup import kernel
from mulki.ops.operators import OPERATORS, Request

HERE = Path(__file__).parent
MIB = 1 << 20
TILE = 128  # rows and columns of a tile of the library's products
SHAPES = (
    *((n, p, d) for n in (64, 256, 1024) for p in (10, 100, 1201) for d in (512,)),
    *((256, 1000, 512), (64, 100, 768), (1024, 1201, 768), (256, 1201, 1024), (1024, 1201, 1024)),
    *((4096, 1000, 768), (8192, 8192, 512), (16384, 16384, 768), (4096, 21841, 1024)),
    *((512, 1000, 1280), (32768, 1000, 512)),
)
PAIRED = (
    *((64, 64, 512), (256, 256, 512), (1024, 1024, 512), (4096, 4096, 512), (4096, 4096, 1024)),
    *((8192, 8192, 512), (16384, 16384, 768)),
)
FEW = ((64, 100, 512), (256, 1000, 512), (1024, 1201, 768), (8192, 8192, 512), (512, 1000, 1280))
#: Of an operator: models, passes over logits in the forward pass, and shapes.
ROWS: dict[str, tuple[int, int, tuple[tuple[int, int, int], ...]]] = {
    "teacher_kl": (3, 1, SHAPES),
    "prototype_cross_entropy": (1, 1, FEW),
    "siglip": (1, 1, FEW),
    "contrastive": (1, 2, PAIRED),
    "pair_kl": (2, 2, PAIRED),
    "similarity": (1, 0, FEW),
}


class Counts(NamedTuple):
    """What a step takes."""

    products: float  # of N x P x D, by ours and the library
    launches: int
    memory: float  # MiB: every tensor that a launch reads or writes, once
    loaded: float  # MiB: the same with what tiles of products load again, from the cache
    largest: float  # MiB of the largest tensor that is made and not returned

    def __add__(self, other: object) -> Counts:
        assert isinstance(other, Counts)
        sums = [a + b for a, b in zip(self[:4], other[:4], strict=True)]
        return Counts(sums[0], int(sums[1]), sums[2], sums[3], max(self.largest, other.largest))


NOTHING = Counts(0, 0, 0, 0, 0)


def _product(m: int, n: int, k: int, size: int, unit: int, tile: tuple[int, int]) -> Counts:
    """A product [m, k] x [k, n] of the operands alone, in tiles."""
    once = size * k * (m + n)
    tiles = size * k * (m * math.ceil(n / tile[1]) + n * math.ceil(m / tile[0]))
    return Counts(m * n * k / unit, 0, once / MIB, tiles / MIB, 0)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _of_operation(step: Operation, unit: int) -> Counts:
    if step.allocates:
        largest = max(t.untyped_storage().nbytes() for t in step.written)
        return Counts(0, 0, 0, 0, largest / MIB)
    written = sum(map(_bytes, step.written))
    read = sum(_bytes(t) for t in step.read)
    largest = max((_bytes(t) for t in step.written), default=0)
    if not step.is_product:
        return Counts(0, 1, (read + written) / MIB, (read + written) / MIB, largest / MIB)
    a, b = step.read[-2:]
    (m, k), n = a.shape, b.shape[1]
    found = _product(m, n, k, a.element_size(), unit, (TILE, TILE))
    return found + Counts(0, 1, written / MIB, written / MIB, largest / MIB)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


def _of_launch(step: Launch, unit: int) -> Counts:
    given = step.arguments
    tile, operands, logits = given.get("TILE"), given.get("operands"), given.get("logits")
    n, total = given["n"], given.get("total", given["n"])
    # Numbers of rows are those of this launch.
    moved = 0.0
    for t in _tensors([value for name, value in given.items() if name != "operands"]):
        moved += _bytes(t) * (n / total if t.ndim < 3 and t.shape[:1] == (total,) else 1)
    found = Counts(0, 1, moved / MIB, moved / MIB, 0)
    if operands is None or logits is not None:
        return found
    # Tiles of classes are walked twice where there are gradients and a tile has not all of them.
    again = given.get("GRADIENT") and not given.get("WHOLE", step.kernel.__name__ == "siglip_rows")
    for x, w, d in zip(operands.x, operands.w, operands.widths, strict=True):
        one = _product(n, len(w), d, x.element_size(), unit, (tile.rows, tile.columns))
        times = 2 if again else 1
        found += Counts(times * one.products, 0, one.memory, times * one.loaded, 0)
    return found


def counted(steps: list[Launch | Operation], unit: int, returned: tuple[Tensor, ...]) -> Counts:
    """Of recorded steps; `unit` is N P D."""
    kept = {t.untyped_storage()._cdata for t in returned}
    total = NOTHING
    for step in steps:
        if isinstance(step, Launch):
            total += _of_launch(step, unit)
            continue
        found = _of_operation(step, unit)
        if any(t.untyped_storage()._cdata in kept for t in step.written):
            found = found._replace(largest=0)
        total += found
    return total


def ours(op: str, n: int, p: int, d: int) -> Counts:
    """A step of ours, with the multiplication of each gradient by the upstream one."""
    found: tuple[Tensor, ...] = ()

    def step() -> None:
        nonlocal found
        x, leaves = arguments_of(op, n, p, d, torch.bfloat16), OPERATORS[op].leaves
        run, wanted = kernel(op), [True] * OPERATORS[op].leaves
        if op == "similarity":
            run(x, Request(None, "none", [False] * leaves))
            found = run(x, Request(meta(n, p, dtype=torch.bfloat16), "none", wanted))
            return
        out = run(x, Request(None, "mean", wanted))
        found = (*out, *(gradient * out[0] for gradient in out[-leaves:]))

    steps = recorded(step)
    return counted(steps, n * p * d, found)


def eager(op: str, n: int, p: int, d: int) -> Counts:
    """The formula in plain PyTorch, with logits in float32, and its backward."""
    found: tuple[Tensor, ...] = ()

    def step() -> None:
        nonlocal found
        x = arguments_of(op, n, p, d, torch.bfloat16)
        leaves = [leaf.requires_grad_() for leaf in x[: OPERATORS[op].leaves]]
        out = OPERATORS[op].reference(x)[0]
        if op == "similarity":
            found = torch.autograd.grad(out, leaves, meta(n, p, dtype=torch.bfloat16))
        else:
            found = torch.autograd.grad(out.mean(), leaves)

    steps = recorded(step)
    return counted(steps, n * p * d, found)


def _least(op: str, n: int, p: int, d: int, size: int) -> Counts:
    """Of torch.compile with logits of `size` bytes, the least: the products write all logits, one
    kernel for each pass reads them, one more makes G in bfloat16, and two products read it."""
    models, passes, _ = ROWS[op]
    unit, matrix = n * p * d, n * p / MIB
    total = NOTHING
    for _ in range(models):
        total += _product(n, p, d, 2, unit, (TILE, TILE)) + Counts(0, 1, 0, 0, 0)
    total += _product(n, d, p, 2, unit, (TILE, TILE)) + _product(p, d, n, 2, unit, (TILE, TILE))
    logits = size * matrix * (2 if op == "similarity" else models)
    moved = logits * (1 + passes + (op != "similarity")) + 2 * matrix + 2 * 2 * (n + p) * d / MIB
    if op == "similarity":  # rows are normalised, and their gradients projected: 10 bytes each
        moved += 10 * (n + p) * d / MIB
    # Kernels of the passes, their sum, G, two products, and the gradient of the scale.
    return total + Counts(0, passes + 5, moved, moved, logits / models)


def table(op: str) -> Iterator[str]:
    """Lines of a table of one operator."""
    yield f"\n## {op}\n\n| N x P x D | products | launches | memory | loaded | largest |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for shape in ROWS[op][2]:
        found = of_all(op, *shape)
        cells = [" / ".join(_short(one[i]) for one in found) for i in range(5)]
        yield f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |"


def _short(number: float) -> str:
    return f"{number:.1f}" if number < 9.95 and number != round(number) else f"{number:.0f}"


def of_all(op: str, n: int, p: int, d: int) -> tuple[Counts, ...]:
    """Counts of a step: of ours, eager, and torch.compile with logits in fp32 and in bf16."""
    compiled = _least(op, n, p, d, 4), _least(op, n, p, d, 2)
    return ours(op, n, p, d), eager(op, n, p, d), *compiled


def more_than_compile() -> Iterator[str]:
    """Where ours moves more bytes than torch.compile with logits in float32 at the least."""
    for op, (_, _, shapes) in ROWS.items():
        pairs = [(ours(op, *shape), _least(op, *shape, 4)) for shape in shapes]
        for i, what in ((2, "memory"), (3, "loaded")):
            worse = [
                f"{' x '.join(map(str, shape))} ({one[i] / other[i]:.1f})"
                for shape, (one, other) in zip(shapes, pairs, strict=True)
                if one[i] > 1.05 * other[i]
            ]
            yield f"- {op}, {what}: {len(worse)} of {len(shapes)} shapes: {', '.join(worse)}"


HEADER = """\
# What the Triton kernels take, counted

**Every figure here is counted, none was timed**, and no card was at hand. A step is forward and
backward for the mean of a loss, in bfloat16, with two teachers (one of pairs). Where ours reads or
writes over 5 % more bytes than torch.compile with equal numerics (logits in float32), and how many
times as many:

{more}

"products" are of N x P x D, those that our kernels make themselves included; "memory" is MiB of
every tensor that a launch reads or writes, once; "loaded" adds what tiles of products load again,
most of it from the L2 cache (of the library: tiles of 128 x 128); "largest" is MiB of the largest
tensor beside the results. A cell is ours / eager / torch.compile with logits in fp32 / in bf16.
Eager is the formula of `mulki.ops`, in float32. Of torch.compile the least that it can do is
counted: one kernel for each pass over the logits, and none between. Logits in bfloat16 break what
the losses promise of accuracy (docs/numerics.md). `python -m benchmarks.kernels` makes this page.
"""


def main() -> None:
    lines = [HEADER.format(more="\n".join(more_than_compile()))]
    for op in ROWS:
        lines += table(op)
    (HERE / "PLAN.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
