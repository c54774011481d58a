# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""The kernels of the losses over the softmax of rows (`row_softmax`), and what launches them.

`stored_rows` takes the logits Y of a block from memory, where products of the library wrote them.
Where a tile holds all columns (`whole`) it reads Y once, and writes G over the student's Y; else it
reads the tiles twice, first for the statistics. Where the columns come in several blocks, the
statistics of the blocks so far lie in `state` [models, 5, N], and a block is merged with those
before it. A second launch, without `statistics`, then takes them from there, and makes G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune, common, schedule, whole_rows
from .chunks import BlockKernel, Blocks, OperandGradients
from .common import ceil_div
from .launch import Repeated
from .products import jit_kernel
from .row_results import RowResults
from .row_softmax import (
    Rows,
    active_columns,
    add_lanes,
    combine_lanes,
    first_lanes,
    logit_gradient,
    model_scales,
    row_loss,
)
from .sums import logit_factor


@dataclass(frozen=True)
class StoredTile:
    """What `stored_rows` takes at a time, and what it does with it."""

    rows: int
    columns: int
    statistics: bool
    whole: bool  # a tile has all columns
    masked: bool  # some column of a tile may not take part
    even: bool  # what may be read ends with a tile


@triton.jit
def _tiles(row_ptrs, signs, columns, column_stride, loaded, EVEN: tl.constexpr):
    """v of every model, from stored logits."""
    vs = ()
    for m in tl.static_range(len(row_ptrs)):
        at = row_ptrs[m][:, None] + columns[None, :] * column_stride
        if EVEN:
            v = tl.load(at)
        else:
            v = tl.load(at, mask=(columns < loaded)[None, :], other=0.0)
        vs = vs + (signs[m] * v,)
    return vs


@triton.jit
def _merge(
    state_ptr, state_rows, samples, inside, c2s, tops, sums, moments, cross_moments, target_values
):  # fmt: skip
    """Merge the statistics of a block with those of the blocks before, and keep them."""
    all_tops, all_sums, all_moments, all_cross, all_targets = (), (), (), (), ()
    for m in tl.static_range(len(tops)):
        at = state_ptr + m * 5 * state_rows + samples
        old = tl.load(at, mask=inside, other=float("-inf"))
        old_sum = tl.load(at + state_rows, mask=inside, other=0.0)
        old_moment = tl.load(at + 2 * state_rows, mask=inside, other=0.0)
        cross = tl.load(at + 3 * state_rows, mask=inside, other=0.0)
        target_value = target_values[m] + tl.load(at + 4 * state_rows, mask=inside, other=0.0)
        top = tl.maximum(old, tops[m])
        below = tl.where(old == float("-inf"), 0.0, old - top)
        new_below = tl.where(tops[m] == float("-inf"), 0.0, tops[m] - top)
        rescale = tl.exp2(c2s[m] * below)
        new_rescale = tl.exp2(c2s[m] * new_below)
        if m == 0:
            student_below = below
            student_new_below = new_below
            cross += cross_moments[m]
        else:
            cross = rescale * (cross + old_sum * student_below)
            cross += new_rescale * (cross_moments[m] + sums[m] * student_new_below)
        all_tops = all_tops + (top,)
        all_sums = all_sums + (rescale * old_sum + new_rescale * sums[m],)
        moment = rescale * (old_moment + old_sum * below)
        all_moments = all_moments + (moment + new_rescale * (moments[m] + sums[m] * new_below),)
        all_cross = all_cross + (cross,)
        all_targets = all_targets + (target_value,)
    return all_tops, all_sums, all_moments, all_cross, all_targets


@jit_kernel
def stored_rows(
    y_ptrs,  # models of [ROWS n', S] float32
    row_stride,
    column_stride,
    g_ptr,  # [n', *] in the dtype of X, or None
    g_stride,
    inputs,  # see `Rows.inputs`
    outputs,  # see `Rows.outputs`
    factors,  # see `Factors.values`
    state_ptr,  # [models, 5, state_rows], or None
    state_rows,
    first,  # sample of the first row
    offset,  # class of the first column
    n,  # rows of the block
    p,  # columns of the block
    loaded,  # columns that may be read
    classes,  # P
    numbers,  # see `Rows.numbers`
    ignore_index,
    FORM: tl.constexpr,  # see `Form`
    TILE: tl.constexpr,  # see `StoredTile`
):
    MODELS: tl.constexpr = len(y_ptrs)
    LOSS: tl.constexpr = FORM.loss
    SMOOTHED: tl.constexpr = FORM.smoothed
    MASKED: tl.constexpr = TILE.masked
    EVEN: tl.constexpr = TILE.even
    ROWS: tl.constexpr = TILE.rows
    BLOCK_P: tl.constexpr = TILE.columns
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = first + rows.to(tl.int64)
    lanes = tl.arange(0, BLOCK_P)
    mask_ptr = inputs[2]
    c2s, cs, signs = model_scales(inputs[0], inputs[1], numbers[0], MODELS)
    row_ptrs = ()
    for m in tl.static_range(MODELS):
        row_ptrs = row_ptrs + (y_ptrs[m] + rows.to(tl.int64) * row_stride,)
    state_rows = tl.cast(state_rows, tl.int64)
    target = samples - offset
    if FORM.target_source == 1:
        target = tl.load(inputs[3] + samples, mask=inside, other=0) - offset

    if TILE.statistics:
        vs = _tiles(row_ptrs, signs, lanes, column_stride, loaded, EVEN)
        active = active_columns(lanes, offset, p, mask_ptr, MASKED)
        tops, sums, moments, cross_moments = first_lanes(vs, active, SMOOTHED)
        if not TILE.whole:
            for start in range(BLOCK_P, p, BLOCK_P):
                columns = start + lanes
                more = _tiles(row_ptrs, signs, columns, column_stride, loaded, EVEN)
                active = active_columns(columns, offset, p, mask_ptr, MASKED)
                tops, sums, moments, cross_moments = add_lanes(
                    more, active, c2s, tops, sums, moments, cross_moments, SMOOTHED
                )
        tops, sums, moments, cross_moments = combine_lanes(
            c2s, tops, sums, moments, cross_moments, SMOOTHED
        )
        target_values = ()
        has_target = inside & (target >= 0) & (target < p)
        for m in tl.static_range(MODELS):
            if FORM.target_source == 0:
                target_values = target_values + (tl.zeros_like(tops[m]),)
            else:
                at = row_ptrs[m] + tl.where(has_target, target, 0) * column_stride
                target_values = target_values + (
                    signs[m] * tl.load(at, mask=has_target, other=0.0),
                )
        if state_ptr is not None:
            before = rows < tl.where(offset > 0, n, 0)  # whether blocks were before
            tops, sums, moments, cross_moments, target_values = _merge(
                state_ptr, state_rows, samples, before, c2s, tops, sums, moments, cross_moments,
                target_values,
            )  # fmt: skip
            for m in tl.static_range(MODELS):
                at = state_ptr + m * 5 * state_rows + samples
                tl.store(at, tops[m], mask=inside)
                tl.store(at + state_rows, sums[m], mask=inside)
                tl.store(at + 2 * state_rows, moments[m], mask=inside)
                tl.store(at + 3 * state_rows, cross_moments[m], mask=inside)
                tl.store(at + 4 * state_rows, target_values[m], mask=inside)
    else:
        tops, sums, moments, cross_moments, target_values = (), (), (), (), ()
        for m in tl.static_range(MODELS):
            at = state_ptr + m * 5 * state_rows + samples
            tops = tops + (tl.load(at, mask=inside, other=0.0),)
            sums = sums + (tl.load(at + state_rows, mask=inside, other=1.0),)
            moments = moments + (tl.load(at + 2 * state_rows, mask=inside, other=0.0),)
            cross_moments = cross_moments + (tl.load(at + 3 * state_rows, mask=inside, other=0.0),)
            target_values = target_values + (tl.load(at + 4 * state_rows, mask=inside, other=0.0),)

    weights, uniform, at_target = row_loss(
        inputs, outputs, cs, signs, tops, sums, moments, cross_moments, target_values, samples,
        inside, classes, numbers, ignore_index, LOSS,
    )  # fmt: skip
    if g_ptr is not None:
        factor = logit_factor(factors, FORM.folded)
        g_row_ptrs = g_ptr + rows.to(tl.int64) * g_stride
        # G of half precision lies over logits that other threads of the program read: a barrier
        # before it is written. What it lies over was read with this tile or an earlier one.
        if TILE.whole:
            tl.debug_barrier()
            g = logit_gradient(
                vs, active, lanes, target, c2s, tops, weights, uniform, at_target, factor, LOSS
            )
            _store(g_row_ptrs, lanes, g, loaded, EVEN)
        else:
            for start in tl.range(0, p, BLOCK_P, num_stages=1):
                columns = start + lanes
                tiles = _tiles(row_ptrs, signs, columns, column_stride, loaded, EVEN)
                tl.debug_barrier()
                active = active_columns(columns, offset, p, mask_ptr, MASKED)
                g = logit_gradient(
                    tiles, active, columns, target, c2s, tops, weights, uniform, at_target, factor,
                    LOSS,
                )  # fmt: skip
                _store(g_row_ptrs, columns, g, loaded, EVEN)


@triton.jit
def _store(g_row_ptrs, columns, g, loaded, EVEN: tl.constexpr):
    at = g_row_ptrs[:, None] + columns[None, :]
    g = g.to(g_row_ptrs.dtype.element_ty)
    if EVEN:
        tl.store(at, g)
    else:
        tl.store(at, g, mask=(columns < loaded)[None, :])


class StoredRows(BlockKernel):
    """`stored_rows`, for blocks whose logits are stored."""

    def __init__(
        self,
        rows: Rows,
        blocks: Blocks,
        state: Tensor | None = None,  # [models, 5, N]
        statistics: bool = True,
        gradient: bool = False,
        swap: bool = False,  # whether the columns of a block are the rows of the softmax
    ) -> None:
        super().__init__(swap)
        self._rows, self._blocks, self._state = rows, blocks, state
        self._statistics, self._gradient = statistics, gradient

    def _for_size(self, n: int, p: int) -> Repeated:
        rows, blocks, state = self._rows, self._blocks, self._state
        strides, loaded = (blocks.stride, 1), blocks.loaded(p)
        if self._swap:
            n, p, strides, loaded = p, n, (1, blocks.stride), n
        tile = schedule.row_tile(blocks.architecture, len(rows.models), p, self._swap)
        return Repeated(
            stored_rows,
            (ceil_div(n, tile.rows),),
            rows.scale.device,
            tile.warps,
            1,
            **rows.arguments,
            y_ptrs=blocks.of_models[: len(rows.models)],
            row_stride=strides[0],
            column_stride=strides[1],
            g_ptr=blocks.g if self._gradient else None,
            g_stride=blocks.g.stride(0),
            state_ptr=state,
            state_rows=0 if state is None else state.shape[2],
            n=n,
            p=p,
            loaded=loaded,
            TILE=StoredTile(
                tile.rows,
                tile.columns,
                self._statistics,
                whole=self._statistics and p <= tile.columns,
                masked=rows.class_mask is not None or p % tile.columns != 0,
                even=loaded % tile.columns == 0,
            ),
        )


def compute(rows: Rows, wanted: Sequence[bool], dtype: torch.dtype) -> RowResults:
    """The loss of at least one row, and the wanted gradients of X and W in `dtype`."""
    gradient = any(wanted[:2])

    def run(plan: schedule.Plan) -> list[Tensor]:
        if plan.schedule == "rows":
            return whole_rows.compute(rows, wanted, dtype, plan)
        blocks = Blocks(rows.models, plan)
        found = OperandGradients(rows.models[0], wanted, dtype, rows.factors, blocks.once)
        state = None
        if blocks.columns < blocks.p:
            state = common.empty_float32(rows.scale, len(rows.models), 5, blocks.n)
        first_pass = StoredRows(rows, blocks, state, gradient=gradient and state is None)
        second_pass = StoredRows(rows, blocks, state, statistics=False, gradient=True)
        for row_blocks in blocks:
            for block in row_blocks:
                blocks.compute_logits(block)
                first_pass(block)
                if gradient and state is None:
                    found.add(blocks.g, block)
            for block in row_blocks if gradient and state is not None else ():
                blocks.compute_logits(block)
                second_pass(block)
                found.add(blocks.g, block)
        return found.finished()

    problem = schedule.Problem.of(rows.models, gradient, whole=True)
    operand_gradients = autotune.run_plan(f"softmax {rows.loss}", problem, rows.models, run)
    loss, *details, scale_gradients = rows.outputs
    assert loss is not None
    kept = [t for t in details if t is not None]
    return RowResults(loss, (scale_gradients,), operand_gradients, kept)
