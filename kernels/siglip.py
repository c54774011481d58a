# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""siglip: loss_i = sum_j softplus(-y_ij u_ij), u = scale X W^T + bias, N x P pairs.

    X [N, D], W [P, D], y_ij = +1 where j = i + offset, else -1
    G_ij = dL/du_ij = g_i (sigmoid(u_ij) - [j = i + offset]), g_i the upstream gradient

No statistics are needed: a program keeps some rows, walks tiles of columns, makes each
by tl.dot, adds up the loss, and writes G. Beside it there are sums of rows in registers: of G, for
the bias, and of G times X W^T, for the scale. X and W are read, and nothing but G is of size N x P.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mulki.ops import reference
from mulki.ops.operators import OPERATORS, Request
from mulki.ops.siglip import Siglip

from .gradients import Gradients
from .teacher_kl import Inputs, factors_of, upstream_of
from .tiles import Operands, ceil_div, jit_kernel, logit_tiles, new_float32, tile_of


@triton.jit
def sigmoid_minus_match(u, match):
    """sigmoid(u), minus 1 where `match`, without cancellation."""
    e = tl.exp(-tl.abs(u))
    large = 1.0 / (1.0 + e)
    small = e * large
    positive = u >= 0
    return tl.where(match, -tl.where(positive, small, large), tl.where(positive, large, small))


@triton.jit
def softplus(u):
    """log(1 + exp u), accurate also where exp u is small beside 1."""
    e = tl.exp(-tl.abs(u))
    one_more = 1.0 + e
    # log1p(e) = log(1 + e) e / ((1 + e) - 1): the quotient corrects the rounding of 1 + e.
    rounded = one_more == 1.0
    quotient = e / tl.where(rounded, 1.0, one_more - 1.0)
    return tl.maximum(u, 0.0) + tl.where(rounded, e, tl.log(one_more) * quotient)


@jit_kernel
def siglip_rows(
    operands,  # see `Operands`
    bias_ptr,  # 0-d
    g_ptr,  # [n, g_stride] in the dtype of X, or None
    g_stride,
    inputs,  # see `teacher_kl.Inputs`; the upstream gradient and factors
    loss_ptr,  # [N] float32
    of_scale_ptr,  # [N], what each row adds to the gradient of the scale
    of_bias_ptr,  # and to that of the bias
    inverse_count,
    offset,  # sample i matches column i + offset
    first_row, n, total, p,  # sample of the first row, rows of this launch, N, P
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TILE.rows + tl.arange(0, TILE.rows)
    inside = rows < n
    samples = first_row + rows.to(tl.int64)
    scale = tl.load(operands.scales[0]).to(tl.float32)
    bias = tl.load(bias_ptr).to(tl.float32)
    share, factor = factors_of(inputs, operands.scales[0], inverse_count)
    upstream = upstream_of(inputs, samples, inside)
    zero = tl.zeros([TILE.rows], tl.float32)
    loss, of_scale, of_bias = zero, zero, zero
    for start in range(0, p, TILE.columns):
        columns = start + tl.arange(0, TILE.columns)
        (y,) = logit_tiles(operands, None, rows, samples, columns, n, total, p, TILE)
        active = (columns < p)[None, :]
        match = (samples + offset)[:, None] == columns[None, :]
        u = scale * y + bias
        loss += tl.sum(tl.where(active, softplus(tl.where(match, -u, u)), 0.0), 1)
        if GRADIENT:
            g = upstream[:, None] * sigmoid_minus_match(u, match)
            g = tl.where(active, g, 0.0)
            of_scale += tl.sum(g * y, 1)
            of_bias += tl.sum(g, 1)
            if g_ptr is not None:
                at = g_ptr + rows.to(tl.int64)[:, None] * g_stride + columns[None, :]
                g = (factor * g).to(g_ptr.dtype.element_ty)
                tl.store(at, g, mask=inside[:, None] & active)
    tl.store(loss_ptr + samples, loss, mask=inside)
    if GRADIENT:
        tl.store(of_scale_ptr + samples, share * of_scale, mask=inside)
        tl.store(of_bias_ptr + samples, share * of_bias, mask=inside)


def siglip(x: Siglip, request: Request) -> tuple[Tensor, ...]:
    leaves, n, p = x[:4], len(x.image_features), len(x.text_features)
    if n == 0 or p == 0:
        return reference.run(OPERATORS["siglip"], x, request)
    operands = Operands.of((x.image_features,), (x.text_features,), (x.logit_scale,))
    gradients = Gradients(leaves, operands, request)
    loss, of_scale, of_bias = (new_float32(x.image_features, n) for _ in range(3))
    tile, inputs = tile_of(operands, n), Inputs().with_gradients(gradients)

    # Beyond these limits no row has a match, and 32-bit integers would overflow.
    offset = max(-n, min(x.offset, p))

    def launch(rows: slice, g: Tensor | None) -> None:
        size = rows.stop - rows.start
        siglip_rows[(ceil_div(size, tile.rows),)](
            operands, x.logit_bias, g, gradients.stride, inputs, loss, of_scale, of_bias,
            gradients.inverse_count, offset, rows.start, size, n, p, gradients.any, tile,
            **tile.options(),
        )  # fmt: skip

    gradients.over_rows(tile.rows, launch)
    return gradients.results(loss, (), (of_scale, of_bias))
