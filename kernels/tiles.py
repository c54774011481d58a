"""The tile sizes and splits of each launch: one table, by kernel, architecture, dtype and shape.

A program keeps a block of `kept` rows of one operand, and streams over the rows of the other
operand, `streamed` rows at a time. Products take `depth` columns of D per step. A gradient kernel
also keeps `slice` columns of its result. Where this gives too few programs for the GPU, the
streamed rows are split over several programs.

The tiles were chosen by compiling them (`ahead_of_time`) with two teachers: in half precision no
kernel spills registers, and all fit the shared memory. None has been timed on a GPU yet.
`MULKI_AUTOTUNE=1` compares the plans by time (see `autotune`). The first plan is the default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch

from . import common
from .common import Model, ceil_div, next_power_of_2


class Tile(NamedTuple):
    kept: int
    streamed: int
    depth: int
    slice: int  # 0 where there is none
    warps: int
    stages: int


class Plan(NamedTuple):
    """How one launch is divided into programs."""

    schedule: str
    tile: Tile
    splits: int  # programs that share the streamed rows of one block


# The kinds of kernels:
#   rows        streams over P, row statistics in registers
#   sums        streams over P, plain sums in registers (siglip)
#   similarity  computes and writes one tile of the result
#   wide        gradient; keeps whole rows of the result in registers
#   slice       gradient; keeps a slice of the columns, and computes G once per slice
#   part        gradient; computes G once, and sums whole rows of the result in scratch memory
#   stored      loads logits that a matrix product wrote
# "small" tiles are for problems that would give too few programs otherwise. "swapped" tiles are for
# dW where the tiles of dX spill registers: there the samples lie along the columns of a tile, so
# that each thread holds the row values of many samples.
#
# Key: kind, architecture ("" is any), dtype family. Value: tiles, the first is the default.
_Key = tuple[str, str, str]
TABLE: dict[_Key, tuple[Tile, ...]] = {
    ("rows", "", "half"): (Tile(64, 64, 32, 0, 8, 3), Tile(128, 32, 32, 0, 8, 3)),
    ("rows", "sm_90", "half"): (Tile(128, 64, 64, 0, 8, 3), Tile(128, 64, 32, 0, 8, 3)),
    ("rows", "sm_100", "half"): (Tile(128, 64, 64, 0, 8, 3), Tile(128, 64, 32, 0, 8, 3)),
    ("rows", "gfx942", "half"): (Tile(128, 64, 64, 0, 8, 2), Tile(128, 64, 32, 0, 8, 2)),
    ("rows", "", "tf32"): (Tile(64, 64, 32, 0, 8, 2),),
    ("rows", "sm_90", "tf32"): (Tile(128, 64, 32, 0, 8, 2), Tile(64, 64, 32, 0, 8, 2)),
    ("rows", "", "float"): (Tile(64, 32, 32, 0, 8, 2),),
    ("rows", "sm_90", "float"): (Tile(64, 64, 32, 0, 8, 2), Tile(64, 32, 32, 0, 8, 2)),
    ("rows", "gfx942", "float"): (Tile(64, 64, 32, 0, 8, 2),),
    ("rows small", "", "half"): (Tile(16, 32, 64, 0, 4, 3),),
    ("rows small", "", "tf32"): (Tile(16, 32, 32, 0, 4, 3),),
    ("rows small", "", "float"): (Tile(16, 32, 32, 0, 4, 2),),
    ("sums", "", "half"): (Tile(64, 64, 32, 0, 8, 3),),
    ("sums", "", "tf32"): (Tile(64, 64, 32, 0, 8, 2),),
    ("sums", "", "float"): (Tile(64, 32, 32, 0, 8, 2),),
    ("similarity", "", "half"): (Tile(128, 64, 32, 0, 4, 3), Tile(128, 128, 32, 0, 8, 3)),
    ("similarity", "sm_90", "half"): (Tile(128, 128, 64, 0, 8, 3), Tile(128, 64, 64, 0, 4, 3)),
    ("similarity", "sm_100", "half"): (Tile(128, 128, 64, 0, 8, 3), Tile(128, 64, 64, 0, 4, 3)),
    ("similarity", "", "tf32"): (Tile(64, 64, 32, 0, 4, 3),),
    ("similarity", "", "float"): (Tile(64, 32, 32, 0, 4, 2),),
    ("similarity small", "", "half"): (Tile(16, 32, 64, 0, 4, 3),),
    ("similarity small", "", "tf32"): (Tile(16, 32, 32, 0, 4, 3),),
    ("similarity small", "", "float"): (Tile(16, 32, 32, 0, 4, 2),),
    ("wide", "", "half"): (Tile(64, 32, 32, 512, 8, 2),),
    ("slice", "", "half"): (Tile(64, 64, 32, 256, 8, 2),),
    ("slice", "sm_90", "half"): (Tile(64, 64, 32, 256, 8, 2), Tile(128, 64, 32, 128, 8, 2)),
    ("slice", "sm_100", "half"): (Tile(64, 64, 64, 256, 8, 2),),
    ("slice", "gfx942", "half"): (Tile(64, 64, 32, 256, 8, 2), Tile(128, 64, 32, 128, 8, 2)),
    ("slice", "", "tf32"): (Tile(64, 64, 32, 128, 8, 2),),
    ("slice", "", "float"): (Tile(64, 32, 32, 64, 8, 2),),
    ("slice", "gfx942", "float"): (Tile(64, 64, 32, 64, 8, 2),),
    ("part", "", "half"): (Tile(64, 64, 64, 64, 8, 2),),
    ("part", "sm_90", "half"): (Tile(64, 64, 64, 128, 8, 2),),
    ("part", "sm_100", "half"): (Tile(64, 64, 64, 128, 8, 2),),
    ("part", "gfx942", "half"): (Tile(64, 64, 64, 128, 8, 2),),
    ("part", "", "tf32"): (Tile(64, 64, 32, 64, 8, 2),),
    ("part", "", "float"): (Tile(64, 32, 32, 64, 8, 2),),
    ("part small", "", "half"): (Tile(16, 32, 64, 64, 4, 2),),
    ("part small", "", "tf32"): (Tile(16, 32, 32, 64, 4, 2),),
    ("part small", "", "float"): (Tile(16, 32, 32, 64, 4, 2),),
    ("wide swapped", "gfx942", "half"): (Tile(64, 16, 32, 512, 8, 2),),
    ("slice swapped", "sm_90", "half"): (Tile(64, 32, 32, 256, 8, 2),),
    ("slice swapped", "gfx942", "half"): (Tile(128, 16, 32, 256, 8, 2),),
    ("slice swapped", "gfx942", "tf32"): (Tile(64, 16, 32, 128, 8, 2),),
    ("part swapped", "gfx942", "tf32"): (Tile(64, 16, 32, 64, 8, 2),),
    ("slice swapped", "gfx942", "float"): (Tile(64, 16, 32, 64, 8, 2),),
    ("part swapped", "gfx942", "float"): (Tile(64, 16, 32, 64, 8, 2),),
    ("part swapped", "sm_100", "half"): (Tile(64, 32, 64, 64, 8, 2),),
    ("part swapped", "gfx942", "half"): (Tile(64, 16, 64, 128, 8, 2),),
    ("stored", "", "half"): (Tile(4, 256, 16, 0, 4, 1),),
    ("stored", "", "tf32"): (Tile(4, 256, 16, 0, 4, 1),),
}
# In the interpreter a tile is so small that tests have several of them.
_INTERPRETED = Tile(16, 32, 32, 32, 1, 1)

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
# Programs that fill a GPU: one per multiprocessor. It depends on the architecture and not on the
# card, so that all cards of an architecture split sums, and round, in the same way. The rules below
# that use it (when to split, which schedule) are estimates; no GPU has run them yet.
PROGRAMS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 4}
# The most scratch memory for the parts of a split result.
PART_BYTES = 32 << 20


@dataclass(frozen=True)
class Device:
    """What the choice of a tile depends on, beside the shape."""

    architecture: str  # of `common.architecture`
    half: bool  # whether operands are bfloat16 or float16
    precision: str  # of float32 products, see `common.precision`
    # The torch device that kernels run on; tiles do not depend on it.
    place: torch.device | None = field(default=None, compare=False)

    @classmethod
    def of(cls, models: Sequence[Model]) -> Device:
        dtype, place = models[0].features.dtype, models[0].features.device
        architecture = common.architecture(place)
        precision = common.precision(architecture, dtype)
        return cls(architecture, dtype != torch.float32, precision, place)

    @property
    def table_architecture(self) -> str:
        """The architecture of the table that is the most similar to this one."""
        name = self.architecture
        if name in PROGRAMS:
            return name
        if not name.startswith("sm_"):
            return "gfx942"  # the one with the least shared memory
        number = int(name.removeprefix("sm_"))
        if number >= 120 or 80 < number < 90:
            return "sm_86"
        return "sm_100" if number >= 100 else "sm_90" if number >= 90 else "sm_80"

    @property
    def family(self) -> str:
        if self.half:
            return "half"
        return "tf32" if self.precision == "tf32" else "float"

    @property
    def programs(self) -> int:
        return PROGRAMS[self.table_architecture]

    def tiles(self, kind: str) -> tuple[Tile, ...]:
        """The tiles of a kind of kernel, the default first; none if the table has no such kind."""
        if self.table_architecture == "interpreter":
            return () if kind.endswith("swapped") else (_INTERPRETED,)
        exact = TABLE.get((kind, self.table_architecture, self.family))
        return TABLE.get((kind, "", self.family), ()) if exact is None else exact


def _balanced_splits(tiles: int, splits: int) -> int:
    """At most `splits` splits of `tiles`, of which none is empty."""
    return ceil_div(tiles, ceil_div(tiles, max(1, min(splits, tiles))))


@lru_cache(maxsize=1024)
def row_plans(device: Device, kept: int, streamed: int, kind: str = "rows") -> tuple[Plan, ...]:
    """For kernels with statistics of `kept` rows, which stream over `streamed` rows."""
    plans = []
    for name in (kind, "rows small"):
        for tile in device.tiles(name):
            blocks, tiles = ceil_div(kept, tile.kept), ceil_div(streamed, tile.streamed)
            # A program that merges splits loads all splits of a row at once.
            splits = _balanced_splits(tiles, min(device.programs // blocks, 128))
            plans.append(Plan(name, tile, splits))
    return _default_first(plans, device, kept)


@lru_cache(maxsize=1024)
def grid_plans(
    device: Device, kept: int, streamed: int, kind: str = "similarity"
) -> tuple[Plan, ...]:
    """For kernels whose programs compute one tile each."""
    plans = [
        Plan(name, tile, ceil_div(streamed, tile.streamed))
        for name in (kind, f"{kind} small")
        for tile in device.tiles(name)
    ]
    return _default_first(plans, device, kept)


def _default_first(plans: list[Plan], device: Device, kept: int) -> tuple[Plan, ...]:
    # Large tiles come first where they give at least every second multiprocessor a program.
    def programs(plan: Plan) -> int:
        return ceil_div(kept, plan.tile.kept) * plan.splits

    def small(plan: Plan) -> bool:
        return plan.schedule.endswith("small")

    if 2 * programs(plans[0]) >= device.programs:
        return tuple(sorted(plans, key=small))
    return tuple(sorted(plans, key=lambda plan: not small(plan)))


def stored_plan(device: Device, kept: int, streamed: int) -> Plan:
    """For kernels that load stored logits."""
    tile = device.tiles("stored")[0]
    splits = device.programs // ceil_div(kept, tile.kept)
    return Plan(
        "stored", tile, _balanced_splits(ceil_div(streamed, tile.streamed), min(splits, 128))
    )


@lru_cache(maxsize=1024)
def gradient_plans(
    device: Device, kept: int, streamed: int, width: int, swap: bool = False
) -> tuple[Plan, ...]:
    """For the gradient of `kept` rows of `width` columns, a sum over `streamed` rows.

    `swap` is for dW. "wide" is the default while its slice holds a whole row, then "slice". Where
    their programs do not fill the GPU, both are split, and "part" does less work. It is taken while
    it streams over at most two tiles, so that it reads its scratch memory once at most.
    """
    plans = list(_gradient_plans(device, kept, streamed, width, swap))
    underused = 2 * ceil_div(kept, plans[0].tile.kept) < device.programs

    def rank(plan: Plan) -> int:
        if plan.schedule not in ("part", "part small"):
            return 1
        short = ceil_div(ceil_div(streamed, plan.tile.streamed), plan.splits) <= 2
        programs = ceil_div(kept, plan.tile.kept) * plan.splits
        if not underused or not short:
            return 3
        return 0 if 2 * programs >= device.programs or plan.schedule == "part small" else 2

    return tuple(sorted(plans, key=rank))


def _gradient_plans(
    device: Device, kept: int, streamed: int, width: int, swap: bool
) -> Iterator[Plan]:
    most_splits = PART_BYTES // max(1, 4 * kept * width)
    for schedule in ("wide", "slice", "part", "part small"):
        for tile in (swap and device.tiles(f"{schedule} swapped")) or device.tiles(schedule):
            if schedule == "wide" and tile.slice < width:
                continue
            if schedule.startswith("part") and most_splits == 0:
                continue
            columns = min(tile.slice, max(16, next_power_of_2(width)))
            tile = tile._replace(slice=columns)
            blocks = ceil_div(kept, tile.kept)
            if schedule in ("wide", "slice"):
                blocks *= ceil_div(width, columns)
            splits = _balanced_splits(
                ceil_div(streamed, tile.streamed), min(device.programs // blocks, most_splits)
            )
            yield Plan(schedule, tile, splits)


# The most memory for the logits of a chunk of rows and their gradient: about a second-level cache.
CHUNK_BYTES = 56 << 20
# With fewer, the separate matrix products of a chunk are not faster than a fused kernel.
CHUNK_PROTOTYPES = 1024
CHUNK_ROWS = 128


def chunk_rows(device: Device, n: int, p: int, models: int) -> int:
    """Rows of a chunk whose logits are stored, or 0 for another schedule (see `chunks`).

    Never for strict float32, where tl.dot uses tensor cores and torch.mm does not. Never on AMD's
    and Intel's GPUs, where torch.mm of half precision had no float32 result in every version.
    """
    small = n < 4 * CHUNK_PROTOTYPES or p < CHUNK_PROTOTYPES
    if small or not device.architecture.startswith("sm_") or device.family == "float":
        return 0
    row_bytes = p * (4 * models + (2 if device.half else 4))
    rows = CHUNK_BYTES // row_bytes // CHUNK_ROWS * CHUNK_ROWS
    return min(rows, n)
