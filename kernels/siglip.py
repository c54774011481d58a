# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""siglip: loss_i = sum_j softplus(-y_ij u_ij), u = scale X W^T + bias, N x P pairs.

    y_ij = +1 where j = i + offset, else -1
    dL/du_ij = g_i (sigmoid(u_ij) - [j = i + offset]), g_i the upstream gradient

No normaliser is needed, so one launch of `siglip_rows` for each block of logits (`chunks`) does it
all. A program keeps ROWS rows, reads their Y = X W^T once, and writes G over it. Its lanes keep
three sums, with G for an upstream gradient of 1:

    loss    sum_j softplus(-y_ij u_ij)
    moment  sum_j G_ij Y_ij, times g_i the contribution to dL/dscale
    total   sum_j G_ij, times g_i the contribution to dL/dbias

They are added up at the end, and to those of the blocks before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from . import common, results, schedule
from .chunks import Blocks, OperandGradients, PairKernel
from .common import Model
from .products import add_to_rows, jit_kernel, load_logits, store_gradient
from .sums import Factors, logit_factor

if TYPE_CHECKING:
    from mulki.ops.operators import Request
    from mulki.ops.siglip import Siglip


@jit_kernel
def siglip_rows(
    y_ptr,  # [n', S] float32
    row_stride,
    g_ptr,  # [n', *] in the dtype of X, or None
    g_stride,
    bias_ptr,  # 0-d
    upstream_ptr,  # [N], or None for 1
    factors,  # see `Factors`
    sums_ptr,  # [3, sum_rows]: loss, moment, total
    sum_rows,
    offset,  # sample i matches class i + offset
    first_row,  # sample of the first row
    first_column,  # class of the first column
    n,  # rows of the block
    p,  # columns of the block
    loaded,  # columns that may be read
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    scale = tl.load(factors.scale).to(tl.float32)
    bias = tl.load(bias_ptr).to(tl.float32)
    factor = logit_factor(factors)
    sum_rows = tl.cast(sum_rows, tl.int64)
    for i in tl.range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0), disable_licm=True):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        samples = first_row + rows.to(tl.int64)
        upstream = tl.full([ROWS], 1.0, tl.float32)
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr + samples, mask=inside, other=0.0)
        loss = tl.zeros([ROWS, BLOCK_P], tl.float32)
        moment = tl.zeros([ROWS, BLOCK_P], tl.float32)
        total = tl.zeros([ROWS, BLOCK_P], tl.float32)
        row_ptrs = y_ptr + rows.to(tl.int64) * row_stride
        for start in tl.range(0, p, BLOCK_P, num_stages=1):
            columns = start + tl.arange(0, BLOCK_P)
            y = load_logits(row_ptrs, columns, 1, loaded, EVEN)
            match = (samples + offset)[:, None] == (first_column + columns)[None, :]
            u = scale * y + bias
            g = sigmoid_minus_match(u, match)
            value = softplus(tl.where(match, -u, u))
            of_scale = g * y
            if MASKED:
                active = (columns < p)[None, :]
                g = tl.where(active, g, 0.0)
                value = tl.where(active, value, 0.0)
                of_scale = tl.where(active, of_scale, 0.0)
            loss += value
            moment += of_scale
            total += g
            if g_ptr is not None:
                tl.debug_barrier()  # in half precision it lies over logits that others read
                to = g_ptr + rows.to(tl.int64) * g_stride
                store_gradient(to, columns, (factor * upstream)[:, None] * g, loaded, EVEN)
        before = rows < tl.where(first_column > 0, n, 0)
        add_to_rows(sums_ptr, samples, inside, before, tl.sum(loss, 1))
        add_to_rows(sums_ptr + sum_rows, samples, inside, before, upstream * tl.sum(moment, 1))
        add_to_rows(sums_ptr + 2 * sum_rows, samples, inside, before, upstream * tl.sum(total, 1))


@triton.jit
def sigmoid_minus_match(u, match):
    """sigmoid(u), minus 1 where `match`, without cancellation."""
    e = tl.exp2(tl.abs(u) * -1.4426950408889634)
    large = 1.0 / (1.0 + e)
    small = e * large
    positive = u >= 0
    return tl.where(match, -tl.where(positive, small, large), tl.where(positive, large, small))


@triton.jit
def softplus(u):
    """log(1 + exp u), accurate also where exp u is small beside 1."""
    e = tl.exp2(tl.abs(u) * -1.4426950408889634)
    one_more = 1.0 + e
    # log1p(e) = log(1 + e) e / ((1 + e) - 1): the quotient corrects the rounding of 1 + e.
    log1p = tl.where(
        one_more == 1.0,
        e,
        tl.log(one_more) * (e / tl.where(one_more == 1.0, 1.0, one_more - 1.0)),
    )
    return tl.maximum(u, 0.0) + log1p


def siglip(x: Siglip, request: Request) -> tuple[Tensor, ...]:
    leaves, n, p, wanted = x[:4], len(x.image_features), len(x.text_features), request.wanted
    if n == 0 or p == 0:
        return results.of_nothing(request, leaves, (n,))
    model = Model.of(x.image_features, x.text_features)
    scale, bias = common.as_float32(x.logit_scale), common.as_float32(x.logit_bias)
    upstream = results.upstream(request, n)
    count = results.inverse_count(request, n)
    factors = Factors.of(x.image_features, scale, count, upstream=upstream)
    sums = common.empty_float32(bias, 3, n)
    # Beyond these limits no row has a match, and the kernel's 32-bit integers would overflow.
    offset = max(-n, min(x.offset, p))

    gradient = any(wanted[:2])
    problem = schedule.Problem.of([model], gradient, softmax=False)
    blocks = Blocks([model], schedule.plan(problem))
    dtype = results.dtype(request, x.image_features)
    found = OperandGradients(model, wanted, dtype, factors, blocks.once)
    launch_rows = PairKernel(
        siglip_rows,
        blocks,
        gradient,
        bias_ptr=bias,
        upstream_ptr=upstream,
        factors=factors,
        sums_ptr=sums,
        sum_rows=n,
        offset=offset,
    )
    blocks.visit([launch_rows], found if gradient else None)
    loss, *of_scalars = sums
    if request.reduction == "none":
        loss = loss.clone()  # which keeps no memory of the others
    return results.returned(request, factors, leaves, loss, (), found.finished(), of_scalars)
