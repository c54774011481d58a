"""Which tiles a problem is cut into: one table, by kernel, architecture, dtype and shape.

A program owns `own` rows of one operand and walks over the rows of the other, `other` at a time;
products take `depth` columns of D per step. A gradient kernel also holds `slice` columns of its
result. Where whole rows of tiles would leave the GPU idle, the walk is split over programs.

The tiles were chosen by compiling them ahead of time (`entries`), with two teachers: in half
precision none spills registers, and all fit the shared memory. None has been timed on a GPU yet.
`MULKI_AUTOTUNE=1` times the plans given here against one another (see `autotune`). The first plan
is the default.
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
    own: int
    other: int
    depth: int
    slice: int  # 0 where there is none
    warps: int
    stages: int


class Plan(NamedTuple):
    """How one launch is cut."""

    schedule: str
    tile: Tile
    splits: int


# Kinds of kernels: "rows" walks over P with row statistics in registers, "sums" (siglip) with plain
# sums; "similarity" writes its tile. Of gradients, "wide" and "slice" keep rows x slice of the
# result in registers and form the gradient of the logits once per slice; "part" forms it once, and
# adds up its rows x D in scratch that is its own. "stored" reads logits that a matrix product made.
# The small tiles are for problems that would not fill the GPU otherwise. "swapped" ones serve dW
# where those of dX spill registers: its samples lie along a tile, and a thread has the numbers of
# many.
#
# Per kind: architecture ("" is any), dtype family, tiles; the first is the default.
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
# Under the interpreter a test wants more than one tile of a small matrix.
_INTERPRETED = Tile(16, 32, 32, 32, 1, 1)

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
# Programs that fill a GPU: its multiprocessors. A number per architecture, not per card, so that
# sums are split, and round, alike on all of them. What follows from these numbers below (when to
# split, which schedule, how large a chunk) is reckoned and not measured: no GPU has run it yet.
PROGRAMS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 4}
# Scratch for the parts of a split result.
PART_BYTES = 32 << 20


@dataclass(frozen=True)
class Device:
    """What the table is asked for."""

    architecture: str  # of `common.architecture`
    half: bool  # whether all operands are of half precision
    precision: str  # of products of float32
    # Where its kernels run; the table does not look at it.
    place: torch.device | None = field(default=None, compare=False)

    @classmethod
    def of(cls, models: Sequence[Model]) -> Device:
        dtypes = {model.x.dtype for model in models}
        place = models[0].x.device
        architecture = common.architecture(place)
        precision = common.precision(architecture, dtypes)
        return cls(architecture, torch.float32 not in dtypes, precision, place)

    @property
    def known(self) -> str:
        """The architecture of the table that is most like this one."""
        name = self.architecture
        if name in PROGRAMS:
            return name
        if not name.startswith("sm_"):
            return "gfx942"  # the least shared memory
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
        return PROGRAMS[self.known]

    def tiles(self, kind: str) -> tuple[Tile, ...]:
        """The tiles for a kind of kernel, the default first; none where the kind has no entry."""
        if self.known == "interpreter":
            return () if kind.endswith("swapped") else (_INTERPRETED,)
        exact = TABLE.get((kind, self.known, self.family))
        return TABLE.get((kind, "", self.family), ()) if exact is None else exact


def _even(tiles: int, splits: int) -> int:
    """As many splits at most, none of them without a tile."""
    return ceil_div(tiles, ceil_div(tiles, max(1, min(splits, tiles))))


@lru_cache(maxsize=1024)
def row_plans(device: Device, own: int, other: int, kind: str = "rows") -> tuple[Plan, ...]:
    """For kernels that walk over `other` rows with statistics of `own` rows."""
    plans = []
    for name in (kind, "rows small"):
        for tile in device.tiles(name):
            blocks, tiles = ceil_div(own, tile.own), ceil_div(other, tile.other)
            # Merging reads all splits of a row at once.
            splits = _even(tiles, min(device.programs // blocks, 128))
            plans.append(Plan(name, tile, splits))
    return _filling(plans, device, own)


@lru_cache(maxsize=1024)
def grid_plans(device: Device, own: int, other: int, kind: str = "similarity") -> tuple[Plan, ...]:
    """For kernels whose programs own one tile each."""
    plans = [
        Plan(name, tile, ceil_div(other, tile.other))
        for name in (kind, f"{kind} small")
        for tile in device.tiles(name)
    ]
    return _filling(plans, device, own)


def _filling(plans: list[Plan], device: Device, own: int) -> tuple[Plan, ...]:
    # The default first: large tiles where they give every other multiprocessor a program.
    def programs(plan: Plan) -> int:
        return ceil_div(own, plan.tile.own) * plan.splits

    def small(plan: Plan) -> bool:
        return plan.schedule.endswith("small")

    if 2 * programs(plans[0]) >= device.programs:
        return tuple(sorted(plans, key=small))
    return tuple(sorted(plans, key=lambda plan: not small(plan)))


def stored_plan(device: Device, own: int, other: int) -> Plan:
    """For kernels that read logits."""
    tile = device.tiles("stored")[0]
    splits = device.programs // ceil_div(own, tile.own)
    return Plan("stored", tile, _even(ceil_div(other, tile.other), min(splits, 128)))


@lru_cache(maxsize=1024)
def gradient_plans(
    device: Device, own: int, other: int, width: int, swap: bool = False
) -> tuple[Plan, ...]:
    """For the gradient of `own` rows of `width` columns, a sum over `other` rows; `swap` for dW.

    "wide" as long as its slice holds a row, then "slice"; both split where their programs do not
    fill the GPU. There "part" does less work, and is taken while it returns to its scratch once at
    the most.
    """
    plans = list(_gradient_plans(device, own, other, width, swap))
    starved = 2 * ceil_div(own, plans[0].tile.own) < device.programs

    def rank(plan: Plan) -> int:
        if plan.schedule not in ("part", "part small"):
            return 1
        short = ceil_div(ceil_div(other, plan.tile.other), plan.splits) <= 2
        programs = ceil_div(own, plan.tile.own) * plan.splits
        if not starved or not short:
            return 3
        return 0 if 2 * programs >= device.programs or plan.schedule == "part small" else 2

    return tuple(sorted(plans, key=rank))


def _gradient_plans(device: Device, own: int, other: int, width: int, swap: bool) -> Iterator[Plan]:
    fitting = PART_BYTES // max(1, 4 * own * width)
    for schedule in ("wide", "slice", "part", "part small"):
        for tile in (swap and device.tiles(f"{schedule} swapped")) or device.tiles(schedule):
            if schedule == "wide" and tile.slice < width:
                continue
            if schedule.startswith("part") and fitting == 0:
                continue
            held = min(tile.slice, max(16, next_power_of_2(width)))
            tile = tile._replace(slice=held)
            blocks = ceil_div(own, tile.own)
            if schedule in ("wide", "slice"):
                blocks *= ceil_div(width, held)
            splits = _even(ceil_div(other, tile.other), min(device.programs // blocks, fitting))
            yield Plan(schedule, tile, splits)


# Logits of a chunk of rows and their gradient, near the size of the second-level cache.
CHUNK_BYTES = 56 << 20
# Below these a chunk is too small for a matrix product to gain on a fused kernel.
CHUNK_PROTOTYPES = 1024
CHUNK_ROWS = 128


def chunk_rows(device: Device, n: int, p: int, models: int) -> int:
    """Rows of a chunk whose logits are stored for a moment, or 0 for no chunks at all.

    Strict float32 never goes this way: there tl.dot has the tensor cores, torch.mm has not. Nor do
    AMD's and Intel's GPUs, where torch.mm of half precision has not always had a float32 result.
    """
    small = n < 4 * CHUNK_PROTOTYPES or p < CHUNK_PROTOTYPES
    if small or not device.architecture.startswith("sm_") or device.family == "float":
        return 0
    row_bytes = p * (4 * models + (2 if device.half else 4))
    rows = CHUNK_BYTES // row_bytes // CHUNK_ROWS * CHUNK_ROWS
    return min(rows, n)
