# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""The statistics of rows (`row_softmax`) without stored logits, and with them the loss.

A program of `streamed_rows` multiplies tiles of rows and columns for one model after another. Of
each tile it keeps the statistics alone, and merges them with those of the tiles before (the online
softmax). Operands come by tensor descriptors: where the hardware has them (NVIDIA from sm_90 on),
it copies tiles to shared memory by itself. There are as many programs as run at a time, and each
takes one block of rows after another.

Where blocks of rows are few, columns are divided in parts, and different programs take them.
`finish_rows` merges the parts in their order, and writes the loss. It multiplies the row of X and
the prototype of the target, so that tiles need not look for a target.

For half precision alone: its products are exact in float32, so that both kernels have the same
logits but for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, schedule
from .common import Model, ceil_div
from .launch import launch, launch_with_descriptors
from .products import jit_kernel
from .row_softmax import Rows, active_columns, model_scales, row_loss
from .row_statistics import (
    Statistics,
    load_state,
    merge,
    store_state,
    store_targets,
    with_model,
)

# v of a column that takes no part: so low that its exponential is zero, and no product of it is
# infinite. For that |c| has a least value, which changes no exponential of a v that is smaller.
INACTIVE = tl.constexpr(-1e30)
LEAST_SCALE = tl.constexpr(1e-24)
FINISHED_ROWS, FINISHED_DEPTH = 8, 128  # of a tile of `finish_rows`


class StreamTile(NamedTuple):
    """What `streamed_rows` takes at a time."""

    rows: int
    columns: int
    depth: int  # of D
    masked: bool  # some column may not take part
    precision: str  # of tl.dot
    upcast: bool


@triton.jit
def _logits(x, w, first, start, d, sign, active, TILE: tl.constexpr):
    """v of a tile; x and w are tensor descriptors, of [N, d] and [P, d]."""
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, d, TILE.depth):
        of_x = x.load([first, k])
        of_w = w.load([start, k])
        if TILE.upcast:
            of_x = of_x.to(tl.float32)
            of_w = of_w.to(tl.float32)
        y = tl.dot(of_x, of_w.T, y, input_precision=TILE.precision)
    v = sign * y
    if TILE.masked:
        v = tl.where(active, v, INACTIVE)
    return v


@triton.jit
def _tile_statistics(v, c2, student_v, student_top):
    """The largest v of a tile's rows, or INACTIVE, then their sum, moment and cross moment."""
    top = tl.max(v, 1)
    below = v - top[:, None]
    e = tl.exp2(tl.maximum(c2, LEAST_SCALE) * below)
    moment = tl.sum(e * below, 1)
    cross_moment = tl.sum(e * (student_v - student_top[:, None]), 1)
    return top, tl.sum(e, 1), moment, cross_moment


@triton.jit
def _no_statistics(zero, MODELS: tl.constexpr):
    found = Statistics((), (), (), ())
    for _ in tl.static_range(MODELS):
        found = with_model(found, zero + float("-inf"), zero, zero, zero)
    return found


@triton.jit
def _with_tile(statistics, found, none):
    """`statistics` with those of one more model, whose tile has no columns where `none`."""
    top, total, moment, cross_moment = found
    return with_model(
        statistics,
        tl.where(none, float("-inf"), top),
        tl.where(none, 0.0, total),
        tl.where(none, 0.0, moment),
        tl.where(none, 0.0, cross_moment),
    )


@jit_kernel
def streamed_rows(
    operands,  # see `Operands`
    inputs,  # of `Rows`, as the next one
    numbers,
    state_ptr,  # [parts, models, 5, N]
    n,
    classes,  # P
    parts,  # of the columns
    span,  # columns of a part
    SMOOTHED: tl.constexpr,
    TILE: tl.constexpr,  # see `StreamTile`
):
    MODELS: tl.constexpr = len(operands.x)
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    scales = model_scales(inputs, numbers, MODELS)
    xs, ws = (), ()
    for m in tl.static_range(MODELS):
        d = operands.widths[m]
        x = tl.make_tensor_descriptor(
            operands.x[m], [n, d], [operands.x_strides[m], 1], [ROWS, DEPTH]
        )
        w = tl.make_tensor_descriptor(
            operands.w[m], [classes, d], [operands.w_strides[m], 1], [COLUMNS, DEPTH]
        )
        xs, ws = xs + (x,), ws + (w,)
    lanes = tl.arange(0, COLUMNS)
    state_rows = tl.cast(n, tl.int64)
    blocks = tl.cdiv(n, ROWS)
    # What lies before a loop stays in registers, of which there are few: nothing is moved there.
    for i in tl.range(tl.program_id(0), blocks * parts, tl.num_programs(0), disable_licm=True):
        part = i // blocks  # programs side by side have columns in common
        first_row = (i - part * blocks) * ROWS
        zero = tl.zeros([ROWS], tl.float32)
        statistics = _no_statistics(zero, MODELS)
        stop = tl.minimum((part + 1) * span, classes)
        for start in tl.range(part * span, stop, COLUMNS, disable_licm=True):
            active = active_columns(start + lanes, 0, classes, inputs.class_mask, TILE.masked)
            student_v = _logits(
                xs[0], ws[0], first_row, start, operands.widths[0], scales.sign[0], active, TILE
            )
            student_top, total, moment, cross_moment = _tile_statistics(
                student_v, scales.c2[0], student_v, zero
            )
            cross_moment = zero
            if SMOOTHED:
                cross_moment = tl.sum(tl.where(student_v == INACTIVE, 0.0, student_v), 1)
            # Where all that take part are NaN the largest is INACTIVE too, but the sum is NaN.
            none = (student_top == INACTIVE) & (total == total)
            found = (student_top, total, moment, cross_moment)
            new = _with_tile(Statistics((), (), (), ()), found, none)
            for m in tl.static_range(1, MODELS):
                v = _logits(
                    xs[m], ws[m], first_row, start, operands.widths[m], scales.sign[m], active, TILE
                )
                found = _tile_statistics(v, scales.c2[m], student_v, student_top)
                new = _with_tile(new, found, none)
            statistics = merge(scales.c2, statistics, new)
        rows = first_row + tl.arange(0, ROWS)
        of_part = state_ptr + state_rows * part * (5 * MODELS)
        store_state(of_part, state_rows, rows, rows < n, statistics)


@jit_kernel
def finish_rows(
    operands,  # see `Operands`
    inputs,  # of `Rows`, as the next two
    outputs,
    numbers,
    state_ptr,  # [parts, models, 5, N]
    n,
    classes,  # P
    parts,
    ignore_index,
    LOSS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Write the loss of rows, and over the first part the statistics of all columns."""
    MODELS: tl.constexpr = len(operands.x)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = rows.to(tl.int64)
    scales = model_scales(inputs, numbers, MODELS)
    state_rows = tl.cast(n, tl.int64)
    statistics, _ = load_state(state_ptr, state_rows, samples, inside, MODELS)
    for part in range(1, parts):
        of_part = state_ptr + state_rows * part * (5 * MODELS)
        new, _ = load_state(of_part, state_rows, samples, inside, MODELS)
        statistics = merge(scales.c2, statistics, new)
    target_values = ()
    for m in tl.static_range(MODELS):
        target_value = tl.zeros([ROWS], tl.float32)
        if inputs.target is not None:
            d = operands.widths[m]
            target = tl.load(inputs.target + samples, mask=inside, other=-1)
            known = ((target >= 0) & (target < classes))[:, None]
            x_row_ptrs = operands.x[m] + samples[:, None] * operands.x_strides[m]
            w_row_ptrs = operands.w[m] + target[:, None] * operands.w_strides[m]
            products = tl.zeros([ROWS, DEPTH], tl.float32)
            for k in range(0, d, DEPTH):
                depth = k + tl.arange(0, DEPTH)[None, :]
                read = known & (depth < d)
                x = tl.load(x_row_ptrs + depth, mask=read, other=0.0).to(tl.float32)
                products += x * tl.load(w_row_ptrs + depth, mask=read, other=0.0).to(tl.float32)
            # No value is above the largest, also where its sum has another order.
            target_value = tl.minimum(scales.sign[m] * tl.sum(products, 1), statistics.tops[m])
        target_values = target_values + (target_value,)
    tl.debug_barrier()  # other threads read what is written over
    store_state(state_ptr, state_rows, samples, inside, statistics)
    store_targets(state_ptr, state_rows, samples, inside, target_values)
    row_loss(
        inputs, outputs, numbers, scales, statistics, target_values, samples, inside, classes,
        ignore_index, LOSS,
    )  # fmt: skip


def takes(models: Sequence[Model]) -> bool:
    """Whether the kernels take these operands."""
    x = models[0].features
    half = x.dtype != torch.float32 or common.architecture(x.device) == "interpreter"
    return half and len(models) <= schedule.STREAMED_MODELS and all(map(_described, models))


def _described(model: Model) -> bool:
    """Whether a tensor descriptor can have these operands.

    Their rows begin and end at multiples of 16 bytes, and none begins within another.
    """
    return all(
        t.data_ptr() % 16 == 0
        and all(size * t.element_size() % 16 == 0 for size in (t.stride(0), t.shape[1]))
        and t.stride(0) >= t.shape[1]
        for t in model
    )


def compute(rows: Rows) -> Tensor:
    """Write the loss of rows, and return their statistics, [models, 5, N]."""
    models, (x, w) = rows.models, rows.models[0]
    n, p = x.shape[0], w.shape[0]
    architecture = common.architecture(x.device)
    tile = schedule.tiles("stream", architecture, x.dtype)[0]
    parts, span = schedule.stream_parts(n, p, tile, len(models))
    state = common.empty_float32(x, parts, len(models), 5, n)
    operands, arguments = rows.operands(), rows.arguments()
    of_first = ("inputs", "numbers", "classes", "SMOOTHED")
    residents = common.resident_programs(x.device, schedule.streams_beside(len(models)))
    launch_with_descriptors(
        streamed_rows,
        (min(parts * ceil_div(n, tile.rows), residents),),
        x.device,
        tile.warps,
        tile.stages,
        **{name: arguments[name] for name in of_first},
        operands=operands,
        state_ptr=state,
        n=n,
        parts=parts,
        span=span,
        TILE=StreamTile(
            *(tile.rows, tile.columns, tile.depth),
            masked=rows.inputs.class_mask is not None or p % tile.columns != 0,
            precision=common.precision(architecture, x.dtype),
            upcast=common.upcast(models),
        ),
    )
    launch(
        finish_rows,
        (ceil_div(n, FINISHED_ROWS),),
        x.device,
        4,
        1,
        **arguments,
        operands=operands,
        state_ptr=state,
        n=n,
        parts=parts,
        ROWS=FINISHED_ROWS,
        DEPTH=FINISHED_DEPTH,
    )
    return state[0]
