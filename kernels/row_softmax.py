# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Softmax statistics over the P columns of a row, for a student and its teachers in one pass.

Y_m = X_m W_m^T of model m (0 is the student) and u = c Y the logits, c = scale / temperature. With
v = sign(c) Y, so that v is largest where u is, a row has for every model

    top = max_j v_j    sum = sum_j e_j    own = sum_j e_j (v_j - top)    e_j = exp(|c| (v_j - top))
    other = sum_j e_j (v'_j - top'), v' the student's (teachers), or sum_j v_j (student, SMOOTHED)
    hit = v at the target

Sums are over v less its largest value, so nothing cancels or overflows on the way: the expected
value of a logit is top + own / sum, and a teacher that equals the student has `other` equal to
`own` to the last bit.

A program owns BLOCK_N rows and one of the splits of P, and walks over the tiles of its split. The
student's tile stays in registers while the teachers' come and go, with four numbers per row and
model; [splits, models, 5, N] numbers are written. `merged` adds splits up, in a kernel that knows
what the loss is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import autotune, common, tiles
from .common import Model, ceil_div, next_power_of_2
from .launch import launch
from .products import entry, moved, repeated, replaced, row_product, scale_of

# Teachers of one launch: each adds four numbers per row to what a program holds, and four of them
# spill registers on every architecture. More go in groups, each with the student.
MAX_TEACHERS = 3

NO_TARGET, TARGET, DIAGONAL = 0, 1, 2


class Statistics(NamedTuple):
    """What `merged` takes."""

    values: Tensor  # [splits, models, 5, N]

    @property
    def splits(self) -> int:
        return self.values.shape[0]

    @property
    def arguments(self) -> dict[str, int | Tensor]:
        return {
            "stats_ptr": self.values,
            "models": self.values.shape[1],
            "splits": self.splits,
            "SPLITS": next_power_of_2(self.splits),
        }

    @property
    def rows(self) -> int:
        """How many rows a program that merges should own."""
        return min(128, max(1, 512 // next_power_of_2(self.splits)))


@triton.jit
def _absorbed(v, keep, c2, top, sum, own, MASKED: tl.constexpr):
    """The statistics with a tile of v added; how the top moved, the tile centred, and its e."""
    if MASKED:
        new = tl.maximum(top, tl.max(tl.where(keep, v, float("-inf")), 1))
        centred = tl.where(keep, v - new[:, None], 0.0)
        e = tl.where(keep, tl.exp2(c2 * centred), 0.0)
    else:
        new = tl.maximum(top, tl.max(v, 1))
        centred = v - new[:, None]
        e = tl.exp2(c2 * centred)
    move = moved(top, new)
    shift = tl.exp2(c2 * move)
    own = shift * (own + sum * move) + tl.sum(e * centred, 1)
    return new, shift * sum + tl.sum(e, 1), own, move, shift, centred, e


@entry
def row_statistics(
    x_ptrs,  # models of [N, D_m], or where STORED of [N, P] float32
    w_ptrs,  # models of [P, D_m]
    x_strides,
    w_strides,
    widths,  # D_m
    scale_ptr,  # 0-d
    teacher_scales_ptr,  # [K], or None
    mask_ptr,  # [P] uint8, nonzero takes part; or None
    target_ptr,  # [N] int64, or None
    stats_ptr,  # [splits, models, 5, N] float32
    n,
    p,
    first,  # teachers in launches before this one
    models,  # of all launches
    tiles_per_split,
    inverse_temperature,
    MODELS: tl.constexpr,  # of this launch
    HITS: tl.constexpr,  # NO_TARGET, TARGET or DIAGONAL
    SMOOTHED: tl.constexpr,
    MASKED: tl.constexpr,  # some column of some tile takes no part
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    samples = tl.minimum(rows, n - 1).to(tl.int64)
    if HITS == 1:
        wanted = tl.load(target_ptr + samples)
    if HITS == 2:
        wanted = samples

    c2, _, sign = scale_of(scale_ptr, inverse_temperature)
    c2s = (c2,)
    signs = (sign,)
    for m in tl.static_range(1, MODELS):
        c2, _, sign = scale_of(teacher_scales_ptr + (first + m - 1), inverse_temperature)
        c2s = c2s + (c2,)
        signs = signs + (sign,)

    zero = tl.zeros([BLOCK_N], tl.float32)
    tops = repeated(zero - float("inf"), MODELS)
    sums = repeated(zero, MODELS)
    owns = repeated(zero, MODELS)
    others = repeated(zero, MODELS)
    hits = repeated(zero, MODELS)

    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tl.cdiv(p, BLOCK_P))):
        columns = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        classes = tl.minimum(columns, p - 1).to(tl.int64)
        keep = columns < p
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + classes) != 0)
        keep = keep[None, :]
        for m in tl.static_range(MODELS):
            v = signs[m] * row_product(
                x_ptrs[m], w_ptrs[m], samples, classes, x_strides[m], w_strides[m], widths[m],
                BLOCK_N, BLOCK_P, DEPTH, EVEN_DEPTH, STORED, PRECISION, UPCAST,
            )  # fmt: skip
            top, sum, own, move, shift, centred, e = _absorbed(
                v, keep, c2s[m], tops[m], sums[m], owns[m], MASKED
            )
            if m == 0:
                student_move = move
                student = centred
                if SMOOTHED:
                    seen = others[0] + tl.sum(tl.where(keep, v, 0.0), 1)
                    others = replaced(others, 0, seen)
            else:
                other = shift * (others[m] + sums[m] * student_move) + tl.sum(e * student, 1)
                others = replaced(others, m, other)
            if HITS != 0:
                here = keep & (columns[None, :] == wanted[:, None])
                at_target = tl.where(here, v, 0.0)
                hits = replaced(hits, m, hits[m] + tl.sum(at_target, 1))
            tops = replaced(tops, m, top)
            sums = replaced(sums, m, sum)
            owns = replaced(owns, m, own)

    inside = rows < n
    n = tl.cast(n, tl.int64)
    for m in tl.static_range(MODELS):
        model = 0 if m == 0 else first + m
        to = stats_ptr + (split * models + model) * 5 * n + rows
        tl.store(to, tops[m], mask=inside)
        tl.store(to + n, sums[m], mask=inside)
        tl.store(to + 2 * n, owns[m], mask=inside)
        tl.store(to + 3 * n, others[m], mask=inside)
        if HITS != 0:
            tl.store(to + 4 * n, hits[m], mask=inside)


@triton.jit
def merged(
    stats_ptr,  # [splits, models, 5, N]
    model,
    rows,  # [ROWS] int64, within N
    student_moves,  # [ROWS, SPLITS] of the student, or None when this is the student
    c2,  # |c| log2 e
    n,
    models,
    splits,
    SPLITS: tl.constexpr,  # the next power of two
):
    """top, sum, own and other of rows over all splits, and how far each split's top moves."""
    split = tl.arange(0, SPLITS)[None, :]
    seen = split < splits
    n = tl.cast(n, tl.int64)
    at = stats_ptr + (split * models + model) * 5 * n + rows[:, None]
    tops = tl.load(at, mask=seen, other=float("-inf"))
    sums = tl.load(at + n, mask=seen, other=0.0)
    owns = tl.load(at + 2 * n, mask=seen, other=0.0)
    others = tl.load(at + 3 * n, mask=seen, other=0.0)
    top = tl.max(tops, 1)
    moves = moved(tops, top[:, None])
    shift = tl.exp2(c2 * moves)
    sum = tl.sum(shift * sums, 1)
    own = tl.sum(shift * (owns + sums * moves), 1)
    if student_moves is None:
        other = tl.sum(others, 1)
    else:
        other = tl.sum(shift * (others + sums * student_moves), 1)
    return top, sum, own, other, moves


@triton.jit
def merged_hit(stats_ptr, model, rows, n, models, splits, SPLITS: tl.constexpr):
    """v at the target: zero in every split but its own."""
    split = tl.arange(0, SPLITS)[None, :]
    n = tl.cast(n, tl.int64)
    at = stats_ptr + ((split * models + model) * 5 + 4) * n + rows[:, None]
    return tl.sum(tl.load(at, mask=split < splits, other=0.0), 1)


def statistics(
    models: Sequence[Model],  # the student, then the teachers
    scale: Tensor,  # 0-d
    teacher_scales: Tensor | None = None,  # [K] float32
    *,
    class_mask: Tensor | None = None,  # [P] uint8
    target: Tensor | None = None,  # [N] int64
    hits: int = NO_TARGET,
    temperature: float = 1.0,
    smoothed: bool = False,
    stored: Sequence[Tensor] | None = None,  # models of Y [N, P] float32, where they are at hand
) -> Statistics:
    """The statistics of all rows, for `merged`."""
    n, p = models[0].x.shape[0], models[0].w.shape[0]
    device = tiles.Device.of(models)

    def run(plan: tiles.Plan) -> Statistics:
        tile, splits = plan.tile, plan.splits
        out = common.empty(scale, splits, len(models), 5, n)
        for first in range(0, max(1, len(models) - 1), MAX_TEACHERS):
            these = [0, *range(first + 1, min(first + 1 + MAX_TEACHERS, len(models)))]
            if stored is None:
                operands = product_operands([models[m] for m in these], tile.depth)
            else:
                operands = stored_operands([stored[m] for m in these])
            launch(
                row_statistics,
                (ceil_div(n, tile.own), splits),
                out.device,
                tile.warps,
                tile.stages,
                **operands,
                scale_ptr=scale,
                teacher_scales_ptr=teacher_scales,
                mask_ptr=class_mask,
                target_ptr=target,
                stats_ptr=out,
                n=n,
                p=p,
                first=first,
                models=len(models),
                tiles_per_split=ceil_div(ceil_div(p, tile.other), splits),
                inverse_temperature=1.0 / temperature,
                MODELS=len(these),
                HITS=hits,
                SMOOTHED=smoothed,
                MASKED=class_mask is not None or p % tile.other != 0,
                BLOCK_N=tile.own,
                BLOCK_P=tile.other,
                PRECISION=device.precision,
            )
        return Statistics(out)

    if stored is not None:
        return run(tiles.stored_plan(device, n, p))
    shape = n, p, models[0].width, len(models)
    return autotune.run("rows", device, shape, tiles.row_plans(device, n, p), run)


def product_operands(models: Sequence[Model], depth: int) -> dict[str, Any]:
    """The arguments that say what is multiplied."""
    return {
        "x_ptrs": tuple(model.x for model in models),
        "w_ptrs": tuple(model.w for model in models),
        "x_strides": tuple(model.x.stride(0) for model in models),
        "w_strides": tuple(model.w.stride(0) for model in models),
        "widths": tuple(model.width for model in models),
        "DEPTH": depth,
        "EVEN_DEPTH": all(model.width % depth == 0 for model in models),
        "STORED": False,
        "UPCAST": common.upcast(models),
    }


def stored_operands(stored: Sequence[Tensor]) -> dict[str, Any]:
    """The same where products are read."""
    return {
        "x_ptrs": tuple(stored),
        "w_ptrs": tuple(stored),
        "x_strides": tuple(y.stride(0) for y in stored),
        "w_strides": tuple(y.stride(1) for y in stored),
        "widths": (0,) * len(stored),
        "DEPTH": 16,
        "EVEN_DEPTH": True,
        "STORED": True,
        "UPCAST": False,
    }
