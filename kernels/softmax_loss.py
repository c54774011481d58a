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

from . import autotune, common, schedule, streamed_rows, whole_rows
from .chunks import BlockKernel, Blocks, OperandGradients, row_programs
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
from .row_states import load_state, merge, store_state
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
def _target_values(
    row_ptrs, signs, target, inside, p, column_stride, TARGET_SOURCE: tl.constexpr
):  # fmt: skip
    """v of every model at the target of each row; 0 where it is not in the block."""
    values = ()
    here = inside & (target >= 0) & (target < p)
    for m in tl.static_range(len(row_ptrs)):
        if TARGET_SOURCE == 0:
            value = tl.zeros(inside.shape, tl.float32)
        else:
            at = row_ptrs[m] + tl.where(here, target, 0) * column_stride
            value = signs[m] * tl.load(at, mask=here, other=0.0)
        values = values + (value,)
    return values


@triton.jit
def _row_statistics(
    row_ptrs, signs, c2s, target, inside, offset, p, loaded, column_stride, mask_ptr,
    FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The five statistics of rows; the first tile of every model, and its active columns."""
    lanes = tl.arange(0, TILE.columns)
    vs = _tiles(row_ptrs, signs, lanes, column_stride, loaded, TILE.even)
    active = active_columns(lanes, offset, p, mask_ptr, TILE.masked)
    tops, sums, moments, cross_moments = first_lanes(vs, active, FORM.smoothed)
    if not TILE.whole:
        for start in range(TILE.columns, p, TILE.columns):
            columns = start + lanes
            more = _tiles(row_ptrs, signs, columns, column_stride, loaded, TILE.even)
            more_active = active_columns(columns, offset, p, mask_ptr, TILE.masked)
            tops, sums, moments, cross_moments = add_lanes(
                more, more_active, c2s, tops, sums, moments, cross_moments, FORM.smoothed
            )
    tops, sums, moments, cross_moments = combine_lanes(
        c2s, tops, sums, moments, cross_moments, FORM.smoothed
    )
    target_values = _target_values(
        row_ptrs, signs, target, inside, p, column_stride, FORM.target_source
    )
    return (tops, sums, moments, cross_moments, target_values), vs, active


@triton.jit
def _store_gradient(
    g_row_ptrs, vs, active, columns, target, c2s, tops, of_g, factor, loaded,
    FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write a tile of G; `of_g` is what `row_loss` returned."""
    weights, uniform, at_target = of_g
    g = logit_gradient(
        vs, active, columns, target, c2s, tops, weights, uniform, at_target, factor, FORM.loss
    ).to(g_row_ptrs.dtype.element_ty)
    at = g_row_ptrs[:, None] + columns[None, :]
    if TILE.even:
        tl.store(at, g)
    else:
        tl.store(at, g, mask=(columns < loaded)[None, :])


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
    ROWS: tl.constexpr = TILE.rows
    lanes = tl.arange(0, TILE.columns)
    c2s, cs, signs = model_scales(inputs[0], inputs[1], numbers[0], MODELS)
    state_rows = tl.cast(state_rows, tl.int64)
    for i in tl.range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0), disable_licm=True):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        samples = first + rows.to(tl.int64)
        row_ptrs = ()
        for m in tl.static_range(MODELS):
            row_ptrs = row_ptrs + (y_ptrs[m] + rows.to(tl.int64) * row_stride,)
        target = samples - offset
        if FORM.target_source == 1:
            target = tl.load(inputs[3] + samples, mask=inside, other=0) - offset
        if TILE.statistics:
            statistics, vs, active = _row_statistics(
                row_ptrs, signs, c2s, target, inside, offset, p, loaded, column_stride, inputs[2],
                FORM, TILE,
            )  # fmt: skip
            if state_ptr is not None:
                before = rows < tl.where(offset > 0, n, 0)  # whether blocks were before
                old = load_state(state_ptr, state_rows, samples, before, MODELS)
                target_values = ()
                for m in tl.static_range(MODELS):
                    target_values = target_values + (old[4][m] + statistics[4][m],)
                statistics = merge(c2s, old, statistics) + (target_values,)
                tl.debug_barrier()  # other threads read what is written over
                store_state(state_ptr, state_rows, samples, inside, statistics)
        else:
            statistics = load_state(state_ptr, state_rows, samples, inside, MODELS)
        of_g = row_loss(
            inputs, outputs, cs, signs, statistics, samples, inside, classes, numbers, ignore_index,
            FORM.loss,
        )  # fmt: skip
        if g_ptr is not None:
            factor = logit_factor(factors, FORM.folded)
            g_row_ptrs = g_ptr + rows.to(tl.int64) * g_stride
            # G of half precision lies over logits that other threads of the program read: a barrier
            # before it is written. What it lies over was read with this tile or an earlier one.
            if TILE.whole:
                tl.debug_barrier()
                _store_gradient(
                    g_row_ptrs, vs, active, lanes, target, c2s, statistics[0], of_g, factor, loaded,
                    FORM, TILE,
                )  # fmt: skip
            else:
                for start in tl.range(0, p, TILE.columns, num_stages=1):
                    columns = start + lanes
                    tiles = _tiles(row_ptrs, signs, columns, column_stride, loaded, TILE.even)
                    tl.debug_barrier()
                    active = active_columns(columns, offset, p, inputs[2], TILE.masked)
                    _store_gradient(
                        g_row_ptrs, tiles, active, columns, target, c2s, statistics[0], of_g,
                        factor, loaded, FORM, TILE,
                    )  # fmt: skip


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
            (row_programs(ceil_div(n, tile.rows), tile.warps, rows.scale.device),),
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
        streamed = plan.schedule == "stream"
        state = streamed_rows.compute(rows) if streamed else None
        if streamed and not gradient:
            return [rows.scale.new_empty(0, dtype=dtype) for _ in range(2)]
        blocks = Blocks(rows.models, plan)
        found = OperandGradients(rows.models[0], wanted, dtype, rows.factors, blocks.once)
        if state is None and blocks.columns < blocks.p:
            state = common.empty_float32(rows.scale, len(rows.models), 5, blocks.n)
        if state is None:
            once = StoredRows(rows, blocks, gradient=gradient)
            blocks.visit([once], found if gradient else None)
            return found.finished()
        first_pass = None if streamed else StoredRows(rows, blocks, state)
        second_pass = StoredRows(rows, blocks, state, statistics=False, gradient=True)
        for row_blocks in blocks:
            if first_pass is not None:
                blocks.visit([first_pass], blocks=row_blocks)
            if gradient:
                blocks.visit([second_pass], found, row_blocks)
        return found.finished()

    streamed = streamed_rows.takes(rows.models)
    problem = schedule.Problem.of(rows.models, gradient, whole=True, streamed=streamed)
    operand_gradients = autotune.run_plan(f"softmax {rows.loss}", problem, rows.models, run)
    loss, *details, scale_gradients = rows.outputs
    assert loss is not None
    kept = [t for t in details if t is not None]
    return RowResults(loss, (scale_gradients,), operand_gradients, kept)
