# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""similarity: z_ij = scale a_i (x_i . w_j) b_j [N, P]; a = b = 1, or the inverse row norms.

Products of the library write blocks of X W^T in float32 (`chunks`), and what is written to z is
their product with the factors. So no normalised row is rounded, and z is rounded once.

The backward is given G. With A = G W, or G times the normalised W, and u = a x:

    dL/dscale = sum_i <u_i, A_i>
    dx = scale A, or with normalisation dx = scale a (A - u <u, A>)

A is a product of the library (for dW likewise G^T X). A program of `project` keeps a few rows,
reads A and X twice, and writes dx and <u, A>.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from . import common, results, schedule
from .chunks import Blocks
from .common import Model, ceil_div
from .launch import launch, multiply
from .products import jit_kernel

if TYPE_CHECKING:
    from mulki.ops.operators import Request
    from mulki.ops.similarity import SimilarityMatrix

ROWS, COLUMNS = 8, 128  # block sizes of `row_inverse_norms` and `project`


@jit_kernel
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


@jit_kernel
def project(
    a_ptr,  # [N, D] float32
    x_ptr,  # [N, D]
    x_stride,
    inverse_norms_ptr,  # [N], or None
    scale_ptr,  # 0-d
    out_ptr,  # [N, D], or None
    projection_ptr,  # [N] <u, A>
    n,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = tl.minimum(rows, n - 1).to(tl.int64)
    scale = tl.load(scale_ptr).to(tl.float32)
    inverse_norm = tl.full([ROWS], 1.0, tl.float32)
    if inverse_norms_ptr is not None:
        inverse_norm = tl.load(inverse_norms_ptr + samples)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, d, COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        within = (columns < d)[None, :]
        a = tl.load(a_ptr + samples[:, None] * d + columns[None, :], mask=within, other=0.0)
        x = tl.load(x_ptr + samples[:, None] * x_stride + columns[None, :], mask=within, other=0.0)
        products += a * (x.to(tl.float32) * inverse_norm[:, None])
    projection = tl.sum(products, 1)
    tl.store(projection_ptr + rows, projection, mask=inside)
    if out_ptr is not None:
        # Norms of at most 1e-12 are replaced by that constant, so nothing is projected out.
        drop = tl.zeros([ROWS], tl.float32)
        if inverse_norms_ptr is not None:
            drop = tl.where(inverse_norm < 0.99e12, projection * inverse_norm, 0.0)
        for k in range(0, d, COLUMNS):
            columns = k + tl.arange(0, COLUMNS)
            within = (columns < d)[None, :]
            a = tl.load(a_ptr + samples[:, None] * d + columns[None, :], mask=within, other=0.0)
            x_at = x_ptr + samples[:, None] * x_stride + columns[None, :]
            x = tl.load(x_at, mask=within, other=0.0)
            out = scale * inverse_norm[:, None] * (a - x.to(tl.float32) * drop[:, None])
            at = out_ptr + samples[:, None] * d + columns[None, :]
            tl.store(at, out.to(out_ptr.dtype.element_ty), mask=within & inside[:, None])


def inverse_norms(operand: Tensor) -> Tensor:
    """1 / max(|x|, 1e-12) of every row, [N] float32."""
    out = common.empty_float32(operand, operand.shape[0])
    launch(
        row_inverse_norms,
        (ceil_div(operand.shape[0], ROWS),),
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


def similarity(x: SimilarityMatrix, request: Request) -> tuple[Tensor, ...]:
    """The matrix in the dtype of the features."""
    leaves, shape = x[:3], (len(x.features), len(x.prototypes))
    if 0 in shape:
        none, *gradients = results.of_nothing(request, leaves, shape)
        return none.to(x.features.dtype), *gradients
    model, scale = Model.of(x.features, x.prototypes), common.as_float32(x.scale)
    of_rows, of_columns = (inverse_norms(v) if x.normalize else None for v in model)
    z = x.features.new_empty(0)
    if request.grad is None:
        z = _matrix(model, scale, of_rows, of_columns)
    gradients = [leaf.new_empty(0, dtype=results.dtype(request, leaf)) for leaf in leaves]
    if any(request.wanted):
        g = x.features.new_ones(()).expand(shape) if request.grad is None else request.grad
        g = g.to(x.features.dtype)
        if request.wanted[0] or request.wanted[2]:
            of_x = gradients[0].dtype if request.wanted[0] else None
            a = _product(g, model.prototypes, of_columns)
            gradients[0], projection = _project(a, model.features, of_rows, scale, of_x)
            if request.wanted[2]:
                gradients[2] = projection.sum().to(gradients[2].dtype)
        if request.wanted[1]:
            a = _product(g.mT, model.features, of_rows)
            gradients[1], _ = _project(a, model.prototypes, of_columns, scale, gradients[1].dtype)
    return z, *gradients


def _matrix(
    model: Model, scale: Tensor, of_rows: Tensor | None, of_columns: Tensor | None
) -> Tensor:
    """z, from the operands and their inverse norms."""
    z = model.features.new_empty((len(model.features), len(model.prototypes)))
    problem = schedule.Problem.of([model], gradient=False, softmax=False)
    blocks = Blocks([model], schedule.plan(problem))
    for block in chain.from_iterable(blocks):
        rows, columns = slice(block.first, block.last), slice(block.start, block.stop)
        blocks.compute_logits(block)
        y = blocks.of_models[0][: block.last - block.first, : block.stop - block.start]
        if of_rows is not None and of_columns is not None:
            y.mul_(of_rows[rows, None]).mul_(of_columns[None, columns])
        torch.mul(y, scale, out=z[rows, columns])
    return z


def _product(g: Tensor, operand: Tensor, inverse_norms: Tensor | None) -> Tensor:
    """G times the operand, or its normalised rows, in float32."""
    if inverse_norms is not None:
        operand = (operand * inverse_norms[:, None]).to(operand.dtype)
    out = common.empty_float32(operand, g.shape[0], operand.shape[1])
    multiply(g, operand, out)
    return out


def _project(
    a: Tensor,
    operand: Tensor,
    inverse_norms: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The gradient of the operand (empty if `dtype` is None), and <u, A> of every row."""
    n, d = a.shape
    out = None if dtype is None else a.new_empty((n, d), dtype=dtype)
    projection = common.empty_float32(a, n)
    launch(
        project,
        (ceil_div(n, ROWS),),
        warps=4,
        stages=1,
        a_ptr=a,
        x_ptr=operand,
        x_stride=operand.stride(0),
        inverse_norms_ptr=inverse_norms,
        scale_ptr=scale,
        out_ptr=out,
        projection_ptr=projection,
        n=n,
        d=d,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return operand.new_empty(0) if out is None else out, projection
