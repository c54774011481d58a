# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""The schedule of small P: products, softmax, loss, G and dX in one launch.

A program keeps some rows, with the logits of all their columns and all models in registers. It
makes G in registers, writes it for the second launch, and multiplies it by W for dX, a slice of
the columns at a time. dW = G^T X is a product of the library, and sums over rows in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import common, schedule
from .chunks import Block, OperandGradients
from .common import ceil_div, round_up
from .launch import launch
from .products import jit_kernel, row_product
from .row_softmax import Rows, active_columns, logit_gradient, model_scales, row_loss
from .row_statistics import combine_lanes, first_lanes
from .sums import logit_factor, result_factor


class WholeTile(NamedTuple):
    """What `whole_rows` takes at a time, and what it does with it."""

    rows: int
    columns: int
    depth: int  # of D, for the logits
    even_depth: bool  # every D is a multiple of it
    masked: bool  # some column may not take part
    gradient: bool
    precision: str  # of tl.dot
    upcast: bool


@jit_kernel
def whole_rows(
    operands,  # see `Operands`
    g_ptr,  # [N, g_stride] in the dtype of X, or None
    g_stride,
    dx_ptr,  # [N, D], or None
    inputs,  # of `Rows`, as the next two
    outputs,
    numbers,
    factors,  # see `Factors`
    n,
    classes,  # P
    ignore_index,
    LOSS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    TILE: tl.constexpr,  # see `WholeTile`
):
    MODELS: tl.constexpr = len(operands.x)
    BLOCK_N: tl.constexpr = TILE.rows
    BLOCK_P: tl.constexpr = TILE.columns
    PRECISION: tl.constexpr = TILE.precision  # Triton 3.6 hands on no string that has no name
    SLICE: tl.constexpr = 64  # of D, for dX
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    samples = rows.to(tl.int64)
    columns = tl.arange(0, BLOCK_P)
    read_rows = tl.minimum(samples, n - 1)
    read_columns = tl.minimum(columns, classes - 1).to(tl.int64)
    scales = model_scales(inputs, numbers, MODELS)
    vs = ()
    for m in tl.static_range(MODELS):
        y = row_product(
            operands.x[m], operands.w[m], read_rows, read_columns, operands.x_strides[m],
            operands.w_strides[m], operands.widths[m], BLOCK_N, BLOCK_P, TILE.depth,
            TILE.even_depth, PRECISION, TILE.upcast,
        )  # fmt: skip
        vs = vs + (scales.sign[m] * y,)
    active = active_columns(columns, 0, classes, inputs.class_mask, TILE.masked)
    statistics = combine_lanes(scales.c2, first_lanes(vs, active, SMOOTHED), SMOOTHED)
    target = tl.full([BLOCK_N], -1, tl.int64)
    if inputs.target is not None:
        target = tl.load(inputs.target + samples, mask=inside, other=-1)
    target_values = ()
    for m in tl.static_range(MODELS):
        target_value = tl.zeros([BLOCK_N], tl.float32)
        if inputs.target is not None:
            target_value = tl.sum(tl.where(columns[None, :] == target[:, None], vs[m], 0.0), 1)
        target_values = target_values + (target_value,)
    of_g = row_loss(
        inputs, outputs, numbers, scales, statistics, target_values, samples, inside, classes,
        ignore_index, LOSS,
    )  # fmt: skip
    if TILE.gradient:
        g = logit_gradient(
            vs, active, columns, target, scales, statistics.tops, of_g, logit_factor(factors), LOSS
        )
        if not TILE.upcast:
            g = g.to(operands.w[0].dtype.element_ty)
        if g_ptr is not None:
            at = g_ptr + samples[:, None] * g_stride + columns[None, :]
            g_inside = inside[:, None] & (columns < g_stride)[None, :]
            tl.store(at, g.to(g_ptr.dtype.element_ty), mask=g_inside)
        if dx_ptr is not None:
            d = operands.widths[0]
            w_row_ptrs = operands.w[0] + read_columns[:, None] * operands.w_strides[0]
            factor = result_factor(factors)
            for k in range(0, d, SLICE):
                depth = k + tl.arange(0, SLICE)[None, :]
                w = tl.load(w_row_ptrs + depth, mask=depth < d, other=0.0)
                if TILE.upcast:
                    w = w.to(tl.float32)
                dx = factor * tl.dot(g, w, input_precision=PRECISION)
                to = dx_ptr + samples[:, None] * d + depth
                tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & (depth < d))


def compute(
    rows: Rows, wanted: Sequence[bool], dtype: torch.dtype, plan: schedule.Plan
) -> list[Tensor]:
    """Write the loss of rows, and return dX and dW."""
    models, (x, w) = rows.models, rows.models[0]
    n, p = x.shape[0], w.shape[0]
    architecture = common.architecture(x.device)
    tile = schedule.whole_tile(architecture, len(models), plan.rows, p, x.dtype)
    dx = x.new_empty(x.shape if wanted[0] else 0, dtype=dtype)
    upcast = common.upcast(models)
    g = None
    if wanted[1]:
        g = x.new_empty((n, round_up(p, 16)), dtype=torch.float32 if upcast else x.dtype)
    launch(
        whole_rows,
        (ceil_div(n, tile.rows),),
        tile.warps,
        tile.stages,
        **rows.arguments(),
        operands=rows.operands(),
        factors=rows.factors,
        g_ptr=g,
        g_stride=0 if g is None else g.shape[1],
        dx_ptr=dx if wanted[0] else None,
        n=n,
        TILE=WholeTile(
            *(tile.rows, tile.columns, tile.depth),
            even_depth=all(model.width % tile.depth == 0 for model in models),
            masked=rows.inputs.class_mask is not None or p != tile.columns,
            gradient=any(wanted[:2]),
            precision=common.precision(architecture, x.dtype),
            upcast=upcast,
        ),
    )
    found = OperandGradients(models[0], (False, wanted[1]), dtype, rows.factors, (True, True))
    if g is not None:
        found.add(g, Block(0, n, 0, p))
    return [dx, found.finished()[1]]
