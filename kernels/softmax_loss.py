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
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, lookup, results, schedule, whole_rows
from .chunks import BlockKernel, Blocks, OperandGradients, row_programs
from .common import ceil_div
from .launch import Repeated
from .products import jit_kernel, load_logits, store_gradient
from .row_softmax import Rows, active_columns, logit_gradient, model_scales, row_loss
from .row_statistics import add_lanes, combine_lanes, first_lanes, load_state, merge, store_state
from .sums import logit_factor

if TYPE_CHECKING:
    from mulki.ops.operators import Request


class StoredTile(NamedTuple):
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
        y = load_logits(row_ptrs[m], columns, column_stride, loaded, EVEN)
        vs = vs + (signs[m] * y,)
    return vs


@triton.jit
def _target_values(row_ptrs, signs, target, inside, p, column_stride, WITH_TARGET: tl.constexpr):
    """v of every model at the target of each row; 0 where it is not in the block."""
    values = ()
    here = inside & (target >= 0) & (target < p)
    for m in tl.static_range(len(row_ptrs)):
        value = tl.zeros(inside.shape, tl.float32)
        if WITH_TARGET:
            at = row_ptrs[m] + tl.where(here, target, 0) * column_stride
            value = signs[m] * tl.load(at, mask=here, other=0.0)
        values = values + (value,)
    return values


@triton.jit
def _row_statistics(
    row_ptrs, scales, first_column, p, loaded, column_stride, mask_ptr,
    SMOOTHED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The statistics of rows; the first tile of every model, and its active columns."""
    columns = tl.arange(0, TILE.columns)
    vs = _tiles(row_ptrs, scales.sign, columns, column_stride, loaded, TILE.even)
    active = active_columns(columns, first_column, p, mask_ptr, TILE.masked)
    lanes = first_lanes(vs, active, SMOOTHED)
    if not TILE.whole:
        for start in range(TILE.columns, p, TILE.columns):
            more_columns = start + columns
            more = _tiles(row_ptrs, scales.sign, more_columns, column_stride, loaded, TILE.even)
            more_active = active_columns(more_columns, first_column, p, mask_ptr, TILE.masked)
            lanes = add_lanes(more, more_active, scales.c2, lanes, SMOOTHED)
    return combine_lanes(scales.c2, lanes, SMOOTHED), vs, active


@jit_kernel
def stored_rows(
    y_ptrs,  # models of [ROWS n', S] float32
    row_stride,
    column_stride,
    g_ptr,  # [n', *] in the dtype of X, or None
    g_stride,
    inputs,  # of `Rows`, as the next two
    outputs,
    numbers,
    factors,  # see `Factors`
    state_ptr,  # [models, 5, state_rows], or None
    state_rows,
    first_row,  # sample of the first row
    first_column,  # class of the first column
    n,  # rows of the block
    p,  # columns of the block
    loaded,  # columns that may be read
    classes,  # P
    ignore_index,
    LOSS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    TILE: tl.constexpr,  # see `StoredTile`
):
    MODELS: tl.constexpr = len(y_ptrs)
    ROWS: tl.constexpr = TILE.rows
    WITH_TARGET: tl.constexpr = inputs.target is not None or LOSS == "diagonal"
    lanes = tl.arange(0, TILE.columns)
    scales = model_scales(inputs, numbers, MODELS)
    state_rows = tl.cast(state_rows, tl.int64)
    for i in tl.range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0), disable_licm=True):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        samples = first_row + rows.to(tl.int64)
        row_ptrs = ()
        for m in tl.static_range(MODELS):
            row_ptrs = row_ptrs + (y_ptrs[m] + rows.to(tl.int64) * row_stride,)
        target = samples - first_column
        if inputs.target is not None:
            target = tl.load(inputs.target + samples, mask=inside, other=0) - first_column
        if TILE.statistics:
            statistics, vs, active = _row_statistics(
                row_ptrs, scales, first_column, p, loaded, column_stride, inputs.class_mask,
                SMOOTHED, TILE,
            )  # fmt: skip
            target_values = _target_values(
                row_ptrs, scales.sign, target, inside, p, column_stride, WITH_TARGET
            )
            if state_ptr is not None:
                before = rows < tl.where(first_column > 0, n, 0)  # whether blocks were before
                old, old_values = load_state(state_ptr, state_rows, samples, before, MODELS)
                statistics = merge(scales.c2, old, statistics)
                values = ()
                for m in tl.static_range(MODELS):
                    values = values + (old_values[m] + target_values[m],)
                target_values = values
                tl.debug_barrier()  # other threads read what is written over
                store_state(state_ptr, state_rows, samples, inside, statistics, target_values)
        else:
            statistics, target_values = load_state(state_ptr, state_rows, samples, inside, MODELS)
        of_g = row_loss(
            inputs, outputs, numbers, scales, statistics, target_values, samples, inside, classes,
            ignore_index, LOSS,
        )  # fmt: skip
        if g_ptr is not None:
            factor = logit_factor(factors)
            g_row_ptrs = g_ptr + rows.to(tl.int64) * g_stride
            # G of half precision lies over logits that other threads of the program read: a barrier
            # before it is written. What it lies over was read with this tile or an earlier one.
            if TILE.whole:
                g = logit_gradient(
                    vs, active, lanes, target, scales, statistics.tops, of_g, factor, LOSS
                )
                tl.debug_barrier()
                store_gradient(g_row_ptrs, lanes, g, loaded, TILE.even)
            else:
                for start in tl.range(0, p, TILE.columns, num_stages=1):
                    columns = start + lanes
                    vs_of_g = _tiles(
                        row_ptrs, scales.sign, columns, column_stride, loaded, TILE.even
                    )
                    tl.debug_barrier()
                    active_of_g = active_columns(
                        columns, first_column, p, inputs.class_mask, TILE.masked
                    )
                    g = logit_gradient(
                        vs_of_g, active_of_g, columns, target, scales, statistics.tops, of_g,
                        factor, LOSS,
                    )  # fmt: skip
                    store_gradient(g_row_ptrs, columns, g, loaded, TILE.even)


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
            (row_programs(ceil_div(n, tile.rows), tile.warps, rows.inputs.scale.device),),
            tile.warps,
            1,
            **rows.arguments(),
            factors=rows.factors,
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
                masked=rows.inputs.class_mask is not None or p % tile.columns != 0,
                even=loaded % tile.columns == 0,
            ),
        )


def _in_blocks(
    rows: Rows, wanted: Sequence[bool], dtype: torch.dtype, plan: schedule.Plan
) -> list[Tensor]:
    """Write the loss of rows, and return dX and dW."""
    blocks, gradient = Blocks(rows.models, plan), any(wanted[:2])
    found = OperandGradients(rows.models[0], wanted, dtype, rows.factors, blocks.once)
    if blocks.columns >= blocks.p:
        once = StoredRows(rows, blocks, gradient=gradient)
        blocks.visit([once], found if gradient else None)
        return found.finished()
    state = common.empty_float32(rows.inputs.scale, len(rows.models), 5, blocks.n)
    first_pass = StoredRows(rows, blocks, state)
    second_pass = StoredRows(rows, blocks, state, statistics=False, gradient=True)
    for row_blocks in blocks:
        blocks.visit([first_pass], blocks=row_blocks)
        if gradient:
            blocks.visit([second_pass], found, row_blocks)
    return found.finished()


def compute(
    rows: Rows, request: Request, leaves: Sequence[Tensor], details: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """The results of an operator, of at least one row."""
    spills = common.architecture(leaves[0].device).startswith("gfx1")  # registers, on AMD's RDNA
    whole = not spills and not lookup.is_capturing()  # a graph saves the host launches, too
    plan = schedule.plan(schedule.Problem.of(rows.models, any(request.wanted[:2]), whole=whole))
    function = whole_rows.compute if plan.schedule == "rows" else _in_blocks
    of_operands = function(rows, request.wanted, results.dtype(request, leaves[0]), plan)
    assert rows.outputs.loss is not None
    of_scalars = [rows.outputs.scale_gradients]
    return results.returned(
        request, rows.factors, leaves, rows.outputs.loss, details, of_operands, of_scalars
    )
