# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Statistics of the softmax of each row, for a student and its teachers in one pass over P.

Model m (0 is the student) has Y_m = X_m W_m^T and logits u = c Y, c = scale / temperature. Let
v = sign(c) Y, which is largest where u is. Then a row has, for every model:

    top           max_j v_j
    sum           sum_j e_j, with e_j = exp(|c| (v_j - top))
    moment        sum_j e_j (v_j - top)
    cross_moment  of a teacher: sum_j e_j (v'_j - top'), v' and top' being the student's
                  of the student, with SMOOTHED: sum_j v_j
    target_value  v at the target

Differences to the top neither overflow nor cancel. The expected v under the softmax is
top + moment / sum. A teacher that equals the student has `cross_moment` equal to `moment`, bit for
bit.

A program keeps BLOCK_N rows, and streams over the tiles of P that belong to its split. The tile of
the student stays in registers while those of the teachers follow one another; so do five numbers
per row and model, which are written at the end, [splits, models, 5, N] float32 in all. The kernel
of each loss then combines the splits with `merge_splits`.
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
from .products import (
    absolute_scale,
    jit_kernel,
    row_product,
    top_change,
    tuple_repeat,
    tuple_replace,
)

# The most teachers of one launch. Each adds four numbers per row to the registers of a program, and
# with four teachers registers spill on every architecture. More teachers take several launches, and
# each of these computes the student again.
MAX_TEACHERS = 3

NO_TARGET, TARGET, DIAGONAL = 0, 1, 2


class Statistics(NamedTuple):
    """The statistics of all rows, which `merge_splits` loads."""

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
    def rows_per_program(self) -> int:
        """Rows of a program that merges the splits."""
        return min(128, max(1, 512 // next_power_of_2(self.splits)))


@triton.jit
def _add_tile(v, active, c2, top, sum, moment, MASKED: tl.constexpr):
    """Add a tile of v to the statistics.

    Returns top, sum and moment; the change of the top and the factor of earlier sums; v - top and e
    of the tile.
    """
    if MASKED:
        new = tl.maximum(top, tl.max(tl.where(active, v, float("-inf")), 1))
        centred = tl.where(active, v - new[:, None], 0.0)
        e = tl.where(active, tl.exp2(c2 * centred), 0.0)
    else:
        new = tl.maximum(top, tl.max(v, 1))
        centred = v - new[:, None]
        e = tl.exp2(c2 * centred)
    change = top_change(top, new)
    rescale = tl.exp2(c2 * change)
    moment = rescale * (moment + sum * change) + tl.sum(e * centred, 1)
    return new, rescale * sum + tl.sum(e, 1), moment, change, rescale, centred, e


@jit_kernel
def row_statistics(
    x_ptrs,  # models of [N, D_m]; with STORED the logits, of [N, P] float32
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
    first,  # number of teachers in earlier launches
    models,  # of all launches together
    tiles_per_split,
    inverse_temperature,
    MODELS: tl.constexpr,  # of this launch
    TARGET_SOURCE: tl.constexpr,  # NO_TARGET, TARGET or DIAGONAL
    SMOOTHED: tl.constexpr,
    MASKED: tl.constexpr,  # whether some column of a tile is not active
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
    if TARGET_SOURCE == 1:
        target_columns = tl.load(target_ptr + samples)
    if TARGET_SOURCE == 2:
        target_columns = samples

    c2, _, sign = absolute_scale(scale_ptr, inverse_temperature)
    c2s = (c2,)
    signs = (sign,)
    for m in tl.static_range(1, MODELS):
        c2, _, sign = absolute_scale(teacher_scales_ptr + (first + m - 1), inverse_temperature)
        c2s = c2s + (c2,)
        signs = signs + (sign,)

    zero = tl.zeros([BLOCK_N], tl.float32)
    tops = tuple_repeat(zero - float("inf"), MODELS)
    sums = tuple_repeat(zero, MODELS)
    moments = tuple_repeat(zero, MODELS)
    cross_moments = tuple_repeat(zero, MODELS)
    target_values = tuple_repeat(zero, MODELS)

    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tl.cdiv(p, BLOCK_P))):
        columns = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        classes = tl.minimum(columns, p - 1).to(tl.int64)
        active = columns < p
        if mask_ptr is not None:
            active = active & (tl.load(mask_ptr + classes) != 0)
        active = active[None, :]
        for m in tl.static_range(MODELS):
            v = signs[m] * row_product(
                x_ptrs[m], w_ptrs[m], samples, classes, x_strides[m], w_strides[m], widths[m],
                BLOCK_N, BLOCK_P, DEPTH, EVEN_DEPTH, STORED, PRECISION, UPCAST,
            )  # fmt: skip
            top, sum, moment, change, rescale, centred, e = _add_tile(
                v, active, c2s[m], tops[m], sums[m], moments[m], MASKED
            )
            if m == 0:
                student_change = change
                student_centred = centred
                if SMOOTHED:
                    total = cross_moments[0] + tl.sum(tl.where(active, v, 0.0), 1)
                    cross_moments = tuple_replace(cross_moments, 0, total)
            else:
                cross_moment = rescale * (cross_moments[m] + sums[m] * student_change) + tl.sum(
                    e * student_centred, 1
                )
                cross_moments = tuple_replace(cross_moments, m, cross_moment)
            if TARGET_SOURCE != 0:
                is_target = active & (columns[None, :] == target_columns[:, None])
                at_target = tl.where(is_target, v, 0.0)
                target_values = tuple_replace(
                    target_values, m, target_values[m] + tl.sum(at_target, 1)
                )
            tops = tuple_replace(tops, m, top)
            sums = tuple_replace(sums, m, sum)
            moments = tuple_replace(moments, m, moment)

    inside = rows < n
    n = tl.cast(n, tl.int64)
    for m in tl.static_range(MODELS):
        model = 0 if m == 0 else first + m
        to = stats_ptr + (split * models + model) * 5 * n + rows
        tl.store(to, tops[m], mask=inside)
        tl.store(to + n, sums[m], mask=inside)
        tl.store(to + 2 * n, moments[m], mask=inside)
        tl.store(to + 3 * n, cross_moments[m], mask=inside)
        if TARGET_SOURCE != 0:
            tl.store(to + 4 * n, target_values[m], mask=inside)


@triton.jit
def merge_splits(
    stats_ptr,  # [splits, models, 5, N]
    model,
    rows,  # [ROWS] int64, within N
    student_changes,  # [ROWS, SPLITS] changes of the student's tops; None for the student itself
    c2,  # |c| log2 e
    n,
    models,
    splits,
    SPLITS: tl.constexpr,  # the next power of two
):
    """Statistics of rows over all splits.

    Returns top, sum, moment, cross_moment, [ROWS] each, and the change of every split's top.
    """
    split = tl.arange(0, SPLITS)[None, :]
    exists = split < splits
    n = tl.cast(n, tl.int64)
    at = stats_ptr + (split * models + model) * 5 * n + rows[:, None]
    tops = tl.load(at, mask=exists, other=float("-inf"))
    sums = tl.load(at + n, mask=exists, other=0.0)
    moments = tl.load(at + 2 * n, mask=exists, other=0.0)
    cross_moments = tl.load(at + 3 * n, mask=exists, other=0.0)
    top = tl.max(tops, 1)
    changes = top_change(tops, top[:, None])
    rescale = tl.exp2(c2 * changes)
    sum = tl.sum(rescale * sums, 1)
    moment = tl.sum(rescale * (moments + sums * changes), 1)
    if student_changes is None:
        cross_moment = tl.sum(cross_moments, 1)
    else:
        cross_moment = tl.sum(rescale * (cross_moments + sums * student_changes), 1)
    return top, sum, moment, cross_moment, changes


@triton.jit
def merge_target_values(stats_ptr, model, rows, n, models, splits, SPLITS: tl.constexpr):
    """v at the target; it is stored as zero in the splits that have no target."""
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
    target_source: int = NO_TARGET,
    temperature: float = 1.0,
    smoothed: bool = False,
    stored: Sequence[Tensor] | None = None,  # Y [N, P] float32 of every model, where stored
) -> Statistics:
    """The statistics of all rows, which `merge_splits` combines."""
    n, p = models[0].features.shape[0], models[0].prototypes.shape[0]
    device = tiles.Device.of(models)

    def run(plan: tiles.Plan) -> Statistics:
        tile, splits = plan.tile, plan.splits
        out = common.empty_float32(scale, splits, len(models), 5, n)
        for first in range(0, max(1, len(models) - 1), MAX_TEACHERS):
            group = [0, *range(first + 1, min(first + 1 + MAX_TEACHERS, len(models)))]
            if stored is None:
                operands = product_operands([models[m] for m in group], tile.depth)
            else:
                operands = stored_operands([stored[m] for m in group])
            launch(
                row_statistics,
                (ceil_div(n, tile.kept), splits),
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
                tiles_per_split=ceil_div(ceil_div(p, tile.streamed), splits),
                inverse_temperature=1.0 / temperature,
                MODELS=len(group),
                TARGET_SOURCE=target_source,
                SMOOTHED=smoothed,
                MASKED=class_mask is not None or p % tile.streamed != 0,
                BLOCK_N=tile.kept,
                BLOCK_P=tile.streamed,
                PRECISION=device.precision,
            )
        return Statistics(out)

    if stored is not None:
        return run(tiles.stored_plan(device, n, p))
    shape = n, p, models[0].width, len(models)
    return autotune.run("rows", device, shape, tiles.row_plans(device, n, p), run)


def product_operands(models: Sequence[Model], depth: int) -> dict[str, Any]:
    """The arguments of a product that the kernel computes."""
    return {
        "x_ptrs": tuple(model.features for model in models),
        "w_ptrs": tuple(model.prototypes for model in models),
        "x_strides": tuple(model.features.stride(0) for model in models),
        "w_strides": tuple(model.prototypes.stride(0) for model in models),
        "widths": tuple(model.width for model in models),
        "DEPTH": depth,
        "EVEN_DEPTH": all(model.width % depth == 0 for model in models),
        "STORED": False,
        "UPCAST": common.upcast(models),
    }


def stored_operands(stored: Sequence[Tensor]) -> dict[str, Any]:
    """The same arguments for a product that is stored."""
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
