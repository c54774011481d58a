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
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, schedule
from .common import Model, ceil_div
from .launch import launch, launch_with_descriptors
from .products import jit_kernel
from .row_softmax import Rows, active_columns, model_scales, row_loss
from .row_states import load_state, merge, store_state

# v of a column that takes no part: so low that its exponential is zero, and no product of it is
# infinite. For that |c| has a least value, which changes no exponential of a v that is smaller.
INACTIVE = tl.constexpr(-1e30)
LEAST_SCALE = tl.constexpr(1e-24)
FINISHED_ROWS, FINISHED_DEPTH = 8, 128  # of a tile of `finish_rows`


@dataclass(frozen=True)
class StreamTile:
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
    tops, zeros = (), ()
    for _ in tl.static_range(MODELS):
        tops, zeros = tops + (zero + float("-inf"),), zeros + (zero,)
    return tops, zeros, zeros, zeros


@triton.jit
def _appended(statistics, found, none):
    """`statistics` with those of one more model, whose tile has no columns where `none`."""
    tops, sums, moments, cross_moments = statistics
    top, total, moment, cross_moment = found
    return (
        tops + (tl.where(none, float("-inf"), top),),
        sums + (tl.where(none, 0.0, total),),
        moments + (tl.where(none, 0.0, moment),),
        cross_moments + (tl.where(none, 0.0, cross_moment),),
    )


@jit_kernel
def streamed_rows(
    x_ptrs,  # models of [N, D_m]
    w_ptrs,  # models of [P, D_m]
    x_strides,
    w_strides,
    widths,  # D_m
    inputs,  # see `Rows.inputs`
    state_ptr,  # [parts, models, 5, N]
    n,
    classes,  # P
    parts,  # of the columns
    span,  # columns of a part
    numbers,  # see `Rows.numbers`
    FORM: tl.constexpr,  # see `Form`
    TILE: tl.constexpr,  # see `StreamTile`
):
    MODELS: tl.constexpr = len(x_ptrs)
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    c2s, _, signs = model_scales(inputs[0], inputs[1], numbers[0], MODELS)
    xs, ws = (), ()
    for m in tl.static_range(MODELS):
        x = tl.make_tensor_descriptor(x_ptrs[m], [n, widths[m]], [x_strides[m], 1], [ROWS, DEPTH])
        w = tl.make_tensor_descriptor(
            w_ptrs[m], [classes, widths[m]], [w_strides[m], 1], [COLUMNS, DEPTH]
        )
        xs, ws = xs + (x,), ws + (w,)
    lanes = tl.arange(0, COLUMNS)
    state_rows = tl.cast(n, tl.int64)
    blocks = tl.cdiv(n, ROWS)
    # What lies before a loop stays in registers, of which there are few: nothing is moved there.
    for i in tl.range(tl.program_id(0), blocks * parts, tl.num_programs(0), disable_licm=True):
        part = i // blocks  # programs side by side have columns in common
        first = (i - part * blocks) * ROWS
        zero = tl.zeros([ROWS], tl.float32)
        tops, sums, moments, cross_moments = _no_statistics(zero, MODELS)
        stop = tl.minimum((part + 1) * span, classes)
        for start in tl.range(part * span, stop, COLUMNS, disable_licm=True):
            active = active_columns(start + lanes, 0, classes, inputs[2], TILE.masked)
            student_v = _logits(xs[0], ws[0], first, start, widths[0], signs[0], active, TILE)
            student_top, total, moment, cross_moment = _tile_statistics(
                student_v, c2s[0], student_v, zero
            )
            cross_moment = zero
            if FORM.smoothed:
                cross_moment = tl.sum(tl.where(student_v == INACTIVE, 0.0, student_v), 1)
            # Where all that take part are NaN the largest is INACTIVE too, but the sum is NaN.
            none = (student_top == INACTIVE) & (total == total)
            found = (student_top, total, moment, cross_moment)
            new = _appended(((), (), (), ()), found, none)
            for m in tl.static_range(1, MODELS):
                v = _logits(xs[m], ws[m], first, start, widths[m], signs[m], active, TILE)
                found = _tile_statistics(v, c2s[m], student_v, student_top)
                new = _appended(new, found, none)
            tops, sums, moments, cross_moments = merge(
                c2s, (tops, sums, moments, cross_moments), new
            )
        rows = first + tl.arange(0, ROWS)
        store_state(
            state_ptr + state_rows * part * (5 * MODELS),
            state_rows,
            rows,
            rows < n,
            (tops, sums, moments, cross_moments),
        )


@jit_kernel
def finish_rows(
    x_ptrs,  # models of [N, D_m]
    w_ptrs,  # models of [P, D_m]
    x_strides,
    w_strides,
    widths,  # D_m
    inputs,  # see `Rows.inputs`
    outputs,  # see `Rows.outputs`
    state_ptr,  # [parts, models, 5, N]
    n,
    classes,  # P
    parts,
    numbers,  # see `Rows.numbers`
    ignore_index,
    FORM: tl.constexpr,  # see `Form`
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Write the loss of rows, and over the first part the statistics of all columns."""
    MODELS: tl.constexpr = len(x_ptrs)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = rows.to(tl.int64)
    c2s, cs, signs = model_scales(inputs[0], inputs[1], numbers[0], MODELS)
    state_rows = tl.cast(n, tl.int64)
    tops, sums, moments, cross_moments, _ = load_state(
        state_ptr, state_rows, samples, inside, MODELS
    )
    for part in range(1, parts):
        new = load_state(
            state_ptr + state_rows * part * (5 * MODELS),
            state_rows, samples, inside, MODELS,
        )  # fmt: skip
        tops, sums, moments, cross_moments = merge(c2s, (tops, sums, moments, cross_moments), new)
    target_values = ()
    for m in tl.static_range(MODELS):
        target_value = tl.zeros([ROWS], tl.float32)
        if FORM.target_source == 1:
            target = tl.load(inputs[3] + samples, mask=inside, other=-1)
            known = ((target >= 0) & (target < classes))[:, None]
            x_row_ptrs = x_ptrs[m] + samples[:, None] * x_strides[m]
            w_row_ptrs = w_ptrs[m] + target[:, None] * w_strides[m]
            products = tl.zeros([ROWS, DEPTH], tl.float32)
            for k in range(0, widths[m], DEPTH):
                depth = k + tl.arange(0, DEPTH)[None, :]
                read = known & (depth < widths[m])
                x = tl.load(x_row_ptrs + depth, mask=read, other=0.0).to(tl.float32)
                products += x * tl.load(w_row_ptrs + depth, mask=read, other=0.0).to(tl.float32)
            # No value is above the largest, also where its sum has another order.
            target_value = tl.minimum(signs[m] * tl.sum(products, 1), tops[m])
        target_values = target_values + (target_value,)
    statistics = (tops, sums, moments, cross_moments, target_values)
    tl.debug_barrier()  # other threads read what is written over
    store_state(state_ptr, state_rows, samples, inside, statistics)
    row_loss(
        inputs, outputs, cs, signs, statistics, samples, inside, classes, numbers, ignore_index,
        FORM.loss,
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
    operands = {
        "x_ptrs": tuple(model.features for model in models),
        "w_ptrs": tuple(model.prototypes for model in models),
        "x_strides": tuple(model.features.stride(0) for model in models),
        "w_strides": tuple(model.prototypes.stride(0) for model in models),
        "widths": tuple(model.width for model in models),
    }
    loss = rows.loss_arguments
    residents = common.resident_programs(x.device, schedule.streams_beside(len(models)))
    launch_with_descriptors(
        streamed_rows,
        (min(parts * ceil_div(n, tile.rows), residents),),
        x.device,
        tile.warps,
        tile.stages,
        **operands,
        **{name: loss[name] for name in ("inputs", "classes", "numbers", "FORM")},
        state_ptr=state,
        n=n,
        parts=parts,
        span=span,
        TILE=StreamTile(
            *(tile.rows, tile.columns, tile.depth),
            masked=rows.class_mask is not None or p % tile.columns != 0,
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
        **operands,
        **loss,
        state_ptr=state,
        n=n,
        parts=parts,
        ROWS=FINISHED_ROWS,
        DEPTH=FINISHED_DEPTH,
    )
    return state[0]
