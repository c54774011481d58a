# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""similarity: scale X W^T [N, P], of the rows as they are or L2-normalised.

Norms enter as factors of rows and columns, so nothing is rounded that is not rounded without them:
z_ij = scale a_i (x_i . w_j) b_j with a, b the inverse norms, which `inverse_norms` finds. A program
of `scaled_product` owns one tile of z, and writes it once from its float32 accumulator.

The backward has its G given: with A = G W (rows of W normalised), dX = scale A without
normalisation, dL/dscale = <X, A>. `project` turns A into the gradient of rows that were normalised,
dx = scale (A - u <u, A>) / |x| with u = x / |x|, and finds <u, A>; a program owns a few rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune, checks, common, gradients, tiles
from .common import Model, ceil_div
from .forms import without_rows
from .gradients import LogitGradient
from .launch import launch
from .products import entry, row_product

ROWS, COLUMNS = 8, 128  # of the programs that work row by row


@entry
def row_inverse_norms(
    x_ptr,  # [N, D]
    x_stride,
    out_ptr,  # [N] float32
    n,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """1 / max(|x|, 1e-12), as torch.nn.functional.normalize divides."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_ptrs = x_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * x_stride
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, d, COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        x = tl.load(x_ptrs + columns[None, :], mask=(columns < d)[None, :], other=0.0)
        x = x.to(tl.float32)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, 1))
    tl.store(out_ptr + rows, 1.0 / tl.maximum(norm, 1e-12), mask=rows < n)


@triton.jit(do_not_specialize=["n"])  # rows of z are p apart
def scaled_product(
    x_ptr,  # [N, D]
    w_ptr,  # [P, D]
    x_stride,
    w_stride,
    d,
    scale_ptr,  # 0-d
    row_factors_ptr,  # [N] float32, or None
    column_factors_ptr,  # [P] float32, or None
    out_ptr,  # [N, P]
    n,
    p,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # One axis, since the others end at 65,535 programs.
    blocks = tl.cdiv(p, BLOCK_P)
    row_block = tl.program_id(0) // blocks
    rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (tl.program_id(0) - row_block * blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    samples = tl.minimum(rows, n - 1)
    classes = tl.minimum(columns, p - 1).to(tl.int64)
    z = row_product(
        x_ptr, w_ptr, samples, classes, x_stride, w_stride, d,
        BLOCK_N, BLOCK_P, DEPTH, EVEN_DEPTH, False, PRECISION, UPCAST,
    )  # fmt: skip
    scale = tl.load(scale_ptr).to(tl.float32)
    if row_factors_ptr is not None:
        z *= tl.load(row_factors_ptr + samples)[:, None]
        z *= tl.load(column_factors_ptr + classes)[None, :]
    z *= scale
    at = out_ptr + rows[:, None] * p + columns[None, :]
    inside = (rows < n)[:, None] & (columns < p)[None, :]
    tl.store(at, z.to(out_ptr.dtype.element_ty), mask=inside)


@entry
def project(
    a_ptr,  # [N, D] float32
    x_ptr,  # [N, D]
    x_stride,
    factors_ptr,  # [N] inverse norms, or None
    scale_ptr,  # 0-d
    out_ptr,  # [N, D], or None
    along_ptr,  # [N] <u, A>
    n,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = tl.minimum(rows, n - 1).to(tl.int64)
    scale = tl.load(scale_ptr).to(tl.float32)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if factors_ptr is not None:
        factor = tl.load(factors_ptr + samples)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, d, COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        within = (columns < d)[None, :]
        a = tl.load(a_ptr + samples[:, None] * d + columns[None, :], mask=within, other=0.0)
        x = tl.load(x_ptr + samples[:, None] * x_stride + columns[None, :], mask=within, other=0.0)
        products += a * (x.to(tl.float32) * factor[:, None])
    along = tl.sum(products, 1)
    tl.store(along_ptr + rows, along, mask=inside)
    if out_ptr is not None:
        # At or below the smallest norm the factor is a constant, and nothing is projected out.
        drop = tl.zeros([ROWS], tl.float32)
        if factors_ptr is not None:
            drop = tl.where(factor < 0.99e12, along * factor, 0.0)
        for k in range(0, d, COLUMNS):
            columns = k + tl.arange(0, COLUMNS)
            within = (columns < d)[None, :]
            a = tl.load(a_ptr + samples[:, None] * d + columns[None, :], mask=within, other=0.0)
            x = tl.load(
                x_ptr + samples[:, None] * x_stride + columns[None, :], mask=within, other=0.0
            )
            out = scale * factor[:, None] * (a - x.to(tl.float32) * drop[:, None])
            at = out_ptr + samples[:, None] * d + columns[None, :]
            tl.store(at, out.to(out_ptr.dtype.element_ty), mask=within & inside[:, None])


def inverse_norms(operand: Tensor) -> Tensor:
    """1 / max(|x|, 1e-12) of every row, [N] float32."""
    out = common.empty(operand, operand.shape[0])
    launch(
        row_inverse_norms,
        (ceil_div(operand.shape[0], ROWS),),
        out.device,
        warps=4,
        stages=1,
        x_ptr=operand,
        x_stride=operand.stride(0),
        out_ptr=out,
        n=operand.shape[0],
        d=operand.shape[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return out


def similarity(x: Tensor, w: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    """[N, P] in the dtype of x."""
    checks.operands(x, w, scale)
    n, p = x.shape[0], w.shape[0]
    out = x.new_empty((n, p))
    if n == 0:
        return out
    model, scale = Model.of(x, w), common.flat(scale)
    row_factors, column_factors = (inverse_norms(v) if normalize else None for v in model)
    device = tiles.Device.of([model])

    def run(plan: tiles.Plan) -> Tensor:
        tile = plan.tile
        launch(
            scaled_product,
            (ceil_div(p, tile.other) * ceil_div(n, tile.own),),
            out.device,
            tile.warps,
            tile.stages,
            x_ptr=model.x,
            w_ptr=model.w,
            x_stride=model.x.stride(0),
            w_stride=model.w.stride(0),
            d=model.width,
            scale_ptr=scale,
            row_factors_ptr=row_factors,
            column_factors_ptr=column_factors,
            out_ptr=out,
            n=n,
            p=p,
            BLOCK_N=tile.own,
            BLOCK_P=tile.other,
            DEPTH=tile.depth,
            EVEN_DEPTH=model.width % tile.depth == 0,
            PRECISION=device.precision,
            UPCAST=common.upcast([model]),
        )
        return out

    plans = tiles.grid_plans(device, n, p)
    return autotune.run("similarity", device, (n, p, model.width), plans, run)


def similarity_backward(
    grad: Tensor, x: Tensor, w: Tensor, scale: Tensor, normalize: bool, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """dx, dw, dscale for an upstream gradient [N, P]."""
    checks.operands(x, w, scale)
    checks.shape("grad", grad, (x.shape[0], w.shape[0]))
    if x.shape[0] == 0:
        return tuple(without_rows(x, w, wanted, x.dtype))
    model, scale = Model.of(x, w), common.flat(scale)
    norms = [inverse_norms(v) if normalize else None for v in model]
    g = LogitGradient(gradients.GIVEN, [model], scale, given=grad.to(x.dtype))
    none = x.new_empty(0)
    dx, dw, dscale = none, none.clone(), common.empty(x, 0)
    if wanted[2] or wanted[0] and normalize:
        raw = gradients.operand_gradient(g, False, torch.float32, norms[1], scaled=False)
        dx, along = _projected(raw, model.x, norms[0], scale, x.dtype if wanted[0] else None)
        dscale = along.sum() if wanted[2] else dscale
    elif wanted[0]:
        dx = gradients.operand_gradient(g, False, x.dtype)
    if wanted[1] and normalize:
        raw = gradients.operand_gradient(g, True, torch.float32, norms[0], scaled=False)
        dw, _ = _projected(raw, model.w, norms[1], scale, x.dtype)
    elif wanted[1]:
        dw = gradients.operand_gradient(g, True, x.dtype)
    return dx, dw, dscale


def _projected(
    raw: Tensor, rows: Tensor, factors: Tensor | None, scale: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The gradient of rows, empty without a dtype, and <u, A> of each."""
    n, d = raw.shape
    out = None if dtype is None else raw.new_empty((n, d), dtype=dtype)
    along = common.empty(raw, n)
    launch(
        project,
        (ceil_div(n, ROWS),),
        raw.device,
        warps=4,
        stages=1,
        a_ptr=raw,
        x_ptr=rows,
        x_stride=rows.stride(0),
        factors_ptr=factors,
        scale_ptr=scale,
        out_ptr=out,
        along_ptr=along,
        n=n,
        d=d,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return rows.new_empty(0) if out is None else out, along
