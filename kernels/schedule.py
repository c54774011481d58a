"""How logits are computed: the schedule of least modelled time, and the tiles of kernels.

    rows     P is so small that a program holds the logits of its rows, of all models: one launch
             makes products, softmax, loss, G and dX, and dW is one product more
    chunks   logits of some rows and all columns are stored, made by products of the library; one
             kernel reads each once, and writes G over it; two more products
    blocks   where memory holds the logits of too few rows: those of some rows and columns are
             stored. Statistics are merged over columns; then the logits are made again, for G

A call without gradients may take any of them, and leaves the second part out. Products are few in
each: K + 1 for the logits, 2 for the gradients, and K + 1 more in the last.

The times are a model, not measured: products at a share of a peak, bytes at a share of a bandwidth,
and launches. They are those of one GPU for all, so that plans, and with them sums, are the same on
all cards of an architecture, and in `benchmarks.kernels plan`. What fits L2 is read at its rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from . import common
from .common import Model, ceil_div, next_power_of_2, round_up

# The most memory for the logits of a block, with G; less where other memory adds up with N and P.
MEMORY, OF_BLOCKS = 64 << 20, 60 << 20
GAP, HOST = 1.5e-6, 12e-6  # seconds of the device, and of Python, for each launch
NEAR = 1.05  # times that differ by less are the same, as far as this model can tell
TILE = 128  # rows and columns of a tile of the library: products of fewer take as long
# Of a program that keeps whole rows: rows, logits (48 for each of 256 threads), columns.
WHOLE_ROWS, WHOLE_VALUES = (16, 32), 48 * 256
WHOLE_COLUMNS = {"half": 256, "tf32": 128, "float": 128}
ROW_CANDIDATES = (16, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 4096, 8192)
COLUMN_CANDIDATES = (1024, 2048, 4096, 8192, 32768, 131072)


class Rates(NamedTuple):
    """Operations and bytes per second of a GPU: published peaks, times shares that are assumed."""

    library: float  # products of the library
    kernel: float  # and of our kernels
    bandwidth: float
    cached: float  # from L2
    cache: int  # bytes of it that stay from launch to launch
    programs: int  # multiprocessors


H100 = {
    "half": Rates(690e12, 250e12, 2.7e12, 5e12, 40 << 20, 132),
    "tf32": Rates(345e12, 125e12, 2.7e12, 5e12, 40 << 20, 132),
    "float": Rates(47e12, 47e12, 2.7e12, 5e12, 40 << 20, 132),
}


def launch_seconds(
    rates: Rates,
    operations: float,
    moved: float,  # bytes
    held: float,  # bytes of all that must stay in the cache for them to be there
    programs: int = 0,  # of ours, which share operations and bytes; 0: of the library or torch
    again: float = 0,  # bytes that they take from the cache once more
) -> float:
    """The device's time of a launch: what takes longest, and the gap before it."""
    took = moved / (rates.cached if held <= rates.cache else rates.bandwidth)
    if programs:
        # A multiprocessor has its share of both rates, and the last round may not fill all.
        rounds = ceil_div(programs, rates.programs) * rates.programs / programs
        took = max(took, rounds * (moved + again) / rates.cached)
        took = max(took, rounds * operations / rates.kernel)
    return GAP + max(took, operations / rates.library)


class Problem(NamedTuple):
    """What the choice depends on."""

    n: int
    p: int
    widths: tuple[int, ...]  # D of every model
    family: str  # "half", "tf32" or "float"
    gradient: bool  # whether dX or dW is wanted
    softmax: bool = True  # whether G needs statistics of whole rows
    columns_too: bool = False  # and of whole columns
    whole: bool = False  # whether there is a kernel for whole rows

    @classmethod
    def of(cls, models: Sequence[Model], gradient: bool, **kind: bool) -> Problem:
        x, w = models[0]
        widths = tuple(model.width for model in models)
        return cls(x.shape[0], w.shape[0], widths, common.number_family(x.dtype), gradient, **kind)

    @property
    def size(self) -> int:
        """Bytes of an operand's element."""
        return 2 if self.family == "half" else 4


class Plan(NamedTuple):
    schedule: str
    rows: int  # of a block; in the schedule "rows", of a program
    columns: int


class Tile(NamedTuple):
    """A tile of a kernel that multiplies itself."""

    rows: int
    columns: int
    depth: int  # columns of D of a step
    warps: int
    stages: int


class RowTile(NamedTuple):
    """What a program takes of stored logits at a time."""

    rows: int
    columns: int
    warps: int


@lru_cache(maxsize=1024)
def plan(problem: Problem) -> Plan:
    """Of the plans whose modelled time is near the least, the one with the fewest launches."""
    took = {one: seconds(problem, one) for one in candidates(problem)}
    near = [one for one, time in took.items() if time <= NEAR * min(took.values())]
    near.sort(key=took.__getitem__)
    return min(near, key=lambda one: sum(count for count, _ in _launches(problem, one)))


def candidates(problem: Problem) -> Iterator[Plan]:
    n, p, models = problem.n, problem.p, len(problem.widths)
    for rows in WHOLE_ROWS if problem.whole else ():
        values = models * rows * max(16, next_power_of_2(p))
        fits = values <= WHOLE_VALUES and p <= WHOLE_COLUMNS[problem.family]
        if fits and problem.size * n * round_up(p, 16) <= OF_BLOCKS:
            yield Plan("rows", rows, p)
    smallest = min(16, n), min(1024, p)
    # Where many models leave no room for more.
    yield Plan("blocks" if smallest[1] < p else "chunks", *smallest)
    for rows in {min(rows, n) for rows in (*ROW_CANDIDATES, n)}:
        # One block saves a product where G needs statistics of columns.
        room = MEMORY if rows == n and problem.columns_too else OF_BLOCKS
        if 4 * models * rows * round_up(p, 32) <= room:
            yield Plan("chunks", rows, p)
        for columns in COLUMN_CANDIDATES:
            if columns < p and 4 * models * rows * columns <= OF_BLOCKS:
                yield Plan("blocks", rows, columns)


def seconds(problem: Problem, plan: Plan) -> float:
    """The modelled time of a plan: of the device, or of the host where that takes longer."""
    launches = list(_launches(problem, plan))
    return max(sum(n * one for n, one in launches), sum(n * HOST for n, _ in launches))


def _launches(problem: Problem, plan: Plan) -> Iterator[tuple[int, float]]:
    """How many launches of a kind there are, and the seconds of each on the device."""
    chunks, parts = ceil_div(problem.n, plan.rows), ceil_div(problem.p, plan.columns)
    rows, columns = ceil_div(problem.n, chunks), ceil_div(problem.p, parts)  # on average
    d, models, size, blocks = problem.widths[0], len(problem.widths), problem.size, chunks * parts
    all_widths, rates = sum(problem.widths), H100[problem.family]
    if plan.schedule == "rows":
        # A program reads all prototypes from the cache.
        width = all_widths + (d if problem.gradient else 0)
        operations = 2 * chunks * plan.rows * max(16, next_power_of_2(problem.p)) * width
        moved: float = size * (problem.n + problem.p) * all_widths
        moved += problem.gradient * problem.n * (size * problem.p + 4 * d)  # G and dX
        again = size * problem.p * (width * chunks - all_widths)
        yield 1, launch_seconds(rates, operations, moved, moved, chunks, again)
        if problem.gradient:
            moved = size * problem.n * (problem.p + d) + 4 * problem.p * d
            yield 1, launch_seconds(rates, padded_operations(problem.p, problem.n, d), moved, moved)
        return
    logits, of_g = 4 * models * rows * columns, size * rows * columns
    held = logits + size * (rows + columns) * all_widths
    statistics = not problem.gradient or (problem.softmax and parts > 1)  # a pass before that of G
    if problem.columns_too:
        yield 2 * blocks, launch_seconds(rates, 0, logits, held, rows)
        statistics = blocks > 1
    elif statistics:
        yield blocks, launch_seconds(rates, 0, logits, held, rows)
    for width in problem.widths:
        times = 2 if statistics and problem.gradient else 1
        moved = size * width * (rows + columns) + 4 * rows * columns
        one = launch_seconds(rates, padded_operations(rows, width, columns), moved, held)
        yield times * blocks, one
    if problem.gradient:
        yield blocks, launch_seconds(rates, 0, logits + of_g, held, rows)
        # The first is written to, the others are added.
        moved = of_g + size * columns * d + 4 * rows * d * (2 - 1 / parts)
        yield blocks, launch_seconds(rates, padded_operations(rows, columns, d), moved, held)
        moved = of_g + size * rows * d + 4 * columns * d * (2 - 1 / chunks)
        yield blocks, launch_seconds(rates, padded_operations(columns, rows, d), moved, held)


def padded_operations(m: int, k: int, n: int) -> int:
    """Operations of a product of the library, of whole tiles."""
    return 2 * round_up(m, TILE) * k * round_up(n, TILE)


def whole_tile(architecture: str, models: int, rows: int, p: int, dtype: torch.dtype) -> Tile:
    """The tile of a program that keeps whole rows."""
    columns = max(16, next_power_of_2(p))
    if architecture == "interpreter":
        return Tile(16, columns, 32, 1, 1)
    half, amd, small = dtype != torch.float32, architecture.startswith("gfx9"), columns <= 128
    # AMD's have 64 threads: more would share a matrix core's tile. float32 takes more registers.
    most = 48 * 128 if half or rows == 16 else 24 * 128
    few = amd or models * rows * columns <= most
    depth = 64 if half and small else 32
    # AMD's have 64 KiB of memory, and three stages take it all, or with Triton 3.6 more than that.
    return Tile(rows, columns, depth, 4 if few else 8, 3 if half and (small or not amd) else 2)


@lru_cache(maxsize=1024)
def row_tile(architecture: str, models: int, columns: int, swap: bool = False) -> RowTile:
    """The tile of a kernel that takes stored logits of so many columns.

    `swap`: its rows are the columns of the logits, whose elements lie beside each other.
    """
    if architecture == "interpreter":  # so small that tests have several
        return RowTile(8, 16, 1)
    if swap:
        return RowTile(32, 128, 8)
    values = models * next_power_of_2(columns)
    if values <= 24 << 10:  # 48 for each thread of 16 warps, and 24 of fewer
        warps = next_power_of_2(ceil_div(values, 768))
        return RowTile(1, max(128, next_power_of_2(columns)), min(16, warps))
    warps = 16 if models <= 3 else 8
    return RowTile(1, 32 * warps * (8 if models == 1 else 4), warps)
