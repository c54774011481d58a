# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""The schedule of small P: products, softmax, loss, G and dX in one launch.

A program keeps some rows, with the logits of all their columns and all models in registers. It
makes G in registers, writes it for the second launch, and multiplies it by W for dX, a slice of
the columns at a time. dW = G^T X is a product of the library, and sums over rows in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from . import common, schedule
from .chunks import Block, OperandGradients
from .common import ceil_div, round_up
from .launch import launch
from .products import jit_kernel, row_product
from .row_softmax import (
    Rows,
    active_columns,
    combine_lanes,
    first_lanes,
    logit_gradient,
    model_scales,
    row_loss,
)
from .sums import logit_factor, result_factor


@dataclass(frozen=True)
class WholeTile:
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
    x_ptrs,  # models of [N, D_m]
    w_ptrs,  # models of [P, D_m]
    x_strides,
    w_strides,
    widths,  # D_m
    g_ptr,  # [N, g_stride] in the dtype of X, or None
    g_stride,
    dx_ptr,  # [N, D], or None
    inputs,  # see `Rows.inputs`
    outputs,  # see `Rows.outputs`
    factors,  # see `Factors.values`
    n,
    classes,  # P
    numbers,  # see `Rows.numbers`
    ignore_index,
    FORM: tl.constexpr,  # see `Form`
    TILE: tl.constexpr,  # see `WholeTile`
):
    MODELS: tl.constexpr = len(x_ptrs)
    LOSS: tl.constexpr = FORM.loss
    SMOOTHED: tl.constexpr = FORM.smoothed
    BLOCK_N: tl.constexpr = TILE.rows
    BLOCK_P: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    EVEN_DEPTH: tl.constexpr = TILE.even_depth
    PRECISION: tl.constexpr = TILE.precision
    UPCAST: tl.constexpr = TILE.upcast
    SLICE: tl.constexpr = 64  # of D, for dX
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    samples = rows.to(tl.int64)
    columns = tl.arange(0, BLOCK_P)
    read_rows = tl.minimum(samples, n - 1)
    read_columns = tl.minimum(columns, classes - 1).to(tl.int64)
    c2s, cs, signs = model_scales(inputs[0], inputs[1], numbers[0], MODELS)
    vs = ()
    for m in tl.static_range(MODELS):
        y = row_product(
            x_ptrs[m], w_ptrs[m], read_rows, read_columns, x_strides[m], w_strides[m], widths[m],
            BLOCK_N, BLOCK_P, DEPTH, EVEN_DEPTH, PRECISION, UPCAST,
        )  # fmt: skip
        vs = vs + (signs[m] * y,)
    active = active_columns(columns, 0, classes, inputs[2], TILE.masked)
    tops, sums, moments, cross_moments = first_lanes(vs, active, SMOOTHED)
    tops, sums, moments, cross_moments = combine_lanes(
        c2s, tops, sums, moments, cross_moments, SMOOTHED
    )
    target = tl.full([BLOCK_N], -1, tl.int64)
    if FORM.target_source == 1:
        target = tl.load(inputs[3] + samples, mask=inside, other=-1)
    target_values = ()
    for m in tl.static_range(MODELS):
        if FORM.target_source == 1:
            at_target = tl.where(columns[None, :] == target[:, None], vs[m], 0.0)
            target_values = target_values + (tl.sum(at_target, 1),)
        else:
            target_values = target_values + (tl.zeros_like(tops[m]),)
    statistics = (tops, sums, moments, cross_moments, target_values)
    weights, uniform, at_target = row_loss(
        inputs, outputs, cs, signs, statistics, samples, inside, classes, numbers, ignore_index,
        LOSS,
    )  # fmt: skip
    if TILE.gradient:
        factor = logit_factor(factors, FORM.folded)
        g = logit_gradient(
            vs, active, columns, target, c2s, tops, weights, uniform, at_target, factor, LOSS
        )
        if not UPCAST:
            g = g.to(w_ptrs[0].dtype.element_ty)
        if g_ptr is not None:
            at = g_ptr + samples[:, None] * g_stride + columns[None, :]
            g_inside = inside[:, None] & (columns < g_stride)[None, :]
            tl.store(at, g.to(g_ptr.dtype.element_ty), mask=g_inside)
        if dx_ptr is not None:
            d = widths[0]
            factor = result_factor(factors, FORM.folded)
            for k in range(0, d, SLICE):
                depth = k + tl.arange(0, SLICE)
                w = tl.load(
                    w_ptrs[0] + (read_columns[:, None] * w_strides[0] + depth[None, :]),
                    mask=(depth < d)[None, :],
                    other=0.0,
                )
                if UPCAST:
                    w = w.to(tl.float32)
                dx = factor * tl.dot(g, w, input_precision=PRECISION)
                to = dx_ptr + samples[:, None] * d + depth[None, :]
                dx_inside = inside[:, None] & (depth < d)[None, :]
                tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=dx_inside)


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
        x.device,
        tile.warps,
        tile.stages,
        **rows.arguments,
        x_ptrs=tuple(model.features for model in models),
        w_ptrs=tuple(model.prototypes for model in models),
        x_strides=tuple(model.features.stride(0) for model in models),
        w_strides=tuple(model.prototypes.stride(0) for model in models),
        widths=tuple(model.width for model in models),
        g_ptr=g,
        g_stride=0 if g is None else g.shape[1],
        dx_ptr=dx if wanted[0] else None,
        n=n,
        TILE=WholeTile(
            *(tile.rows, tile.columns, tile.depth),
            even_depth=all(model.width % tile.depth == 0 for model in models),
            masked=rows.class_mask is not None or p != tile.columns,
            gradient=any(wanted[:2]),
            precision=common.precision(architecture, x.dtype),
            upcast=upcast,
        ),
    )
    found = OperandGradients(models[0], (False, wanted[1]), dtype, rows.factors, (True, True))
    if g is not None:
        found.add(g, Block(0, n, 0, p))
    return [dx, found.finished()[1]]
