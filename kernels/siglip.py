# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""siglip: loss_i = sum_j softplus(-y_ij u_ij), u = scale X W^T + bias, N x P pairs.

    y_ij = +1 where j = i + shift, else -1
    dL/du_ij = g_i (sigmoid(u_ij) - [j = i + shift]), g_i the upstream gradient

No normaliser is needed, so one launch of `siglip_rows` for each block of logits (`chunks`) does it
all. A program keeps ROWS rows, reads their Y = X W^T once, and writes G over it. Its lanes keep
three sums, with G for an upstream gradient of 1:

    loss    sum_j softplus(-y_ij u_ij)
    moment  sum_j G_ij Y_ij, times g_i the contribution to dL/dscale
    total   sum_j G_ij, times g_i the contribution to dL/dbias

They are added up at the end, and to those of the blocks before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune, common, row_results, schedule
from .chunks import Blocks, OperandGradients, PairKernel
from .common import Model
from .pair_tiles import add_to_rows, store_gradient
from .products import jit_kernel
from .row_results import RowResults
from .sums import Factors, logit_factor


@jit_kernel
def siglip_rows(
    y_ptr,  # [n', S] float32
    row_stride,
    g_ptr,  # [n', *] in the dtype of X, or None
    g_stride,
    bias_ptr,  # 0-d
    upstream_ptr,  # [N], or None for 1
    factors,  # see `Factors.values`
    sums_ptr,  # [3, sum_rows]: loss, moment, total
    sum_rows,
    shift,  # sample i matches class i + shift
    first,  # sample of the first row
    offset,  # class of the first column
    n,  # rows of the block
    p,  # columns of the block
    loaded,  # columns that may be read
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    FOLDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    scale = tl.load(factors[0]).to(tl.float32)
    bias = tl.load(bias_ptr).to(tl.float32)
    factor = logit_factor(factors, FOLDED)
    sum_rows = tl.cast(sum_rows, tl.int64)
    for i in tl.range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0), disable_licm=True):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        samples = first + rows.to(tl.int64)
        upstream = tl.full([ROWS], 1.0, tl.float32)
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr + samples, mask=inside, other=0.0)
        loss = tl.zeros([ROWS, BLOCK_P], tl.float32)
        moment = tl.zeros([ROWS, BLOCK_P], tl.float32)
        total = tl.zeros([ROWS, BLOCK_P], tl.float32)
        row_ptrs = y_ptr + rows.to(tl.int64)[:, None] * row_stride
        for start in tl.range(0, p, BLOCK_P, num_stages=1):
            columns = start + tl.arange(0, BLOCK_P)
            if EVEN:
                y = tl.load(row_ptrs + columns[None, :])
            else:
                y = tl.load(
                    row_ptrs + columns[None, :], mask=(columns < loaded)[None, :], other=0.0
                )
            match = (samples + shift)[:, None] == (offset + columns)[None, :]
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
                scaled = (factor * upstream)[:, None] * g
                store_gradient(g_ptr, g_stride, rows, columns, scaled, loaded, EVEN)
        before = rows < tl.where(offset > 0, n, 0)
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


class _Arguments(NamedTuple):
    image_features: Tensor  # [N, D]
    text_features: Tensor  # [P, D]
    logit_scale: Tensor  # 0-d
    logit_bias: Tensor  # 0-d
    shift: int

    @property
    def empty(self) -> bool:
        return self.image_features.shape[0] == 0 or self.text_features.shape[0] == 0


def _compute(
    a: _Arguments,
    upstream: Tensor | None,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    inverse_count: float = 1.0,
) -> tuple[RowResults, Factors]:
    """Losses of at least one row and column, and the wanted gradients in `dtype`."""
    model = Model.of(a.image_features, a.text_features)
    n, p = a.image_features.shape[0], a.text_features.shape[0]
    half = a.image_features.dtype == torch.float16
    upstream = None if upstream is None else common.as_float32(upstream)
    bound = upstream.abs().amax() if half and upstream is not None else None
    factors = Factors(
        common.as_float32(a.logit_scale), not half, inverse_count=inverse_count, bound=bound
    )
    bias = common.as_float32(a.logit_bias)
    sums = common.empty_float32(bias, 3, n)
    gradient = any(wanted[:2])
    # Beyond these limits no row has a match, and the kernel's 32-bit integers would overflow.
    shift = max(-n, min(a.shift, p))

    def run(plan: schedule.Plan) -> list[Tensor]:
        blocks = Blocks([model], plan)
        found = OperandGradients(model, wanted, dtype, factors, blocks.once)
        launch_rows = PairKernel(
            siglip_rows,
            blocks,
            factors,
            gradient,
            bias_ptr=bias,
            upstream_ptr=upstream,
            sums_ptr=sums,
            sum_rows=n,
            shift=shift,
        )
        blocks.visit([launch_rows], found if gradient else None)
        return found.finished()

    problem = schedule.Problem.of([model], gradient, softmax=False)
    operand_gradients = autotune.run_plan("siglip", problem, [model], run)
    loss, of_scale, of_bias = sums
    return RowResults(loss, (of_scale, of_bias), operand_gradients), factors


def siglip(*arguments: Any) -> Tensor:
    """The loss of each row, [N] float32."""
    a = _Arguments(*arguments)
    if a.empty:
        return a.image_features.new_zeros(a.image_features.shape[0], dtype=torch.float32)
    return _compute(a, None, [False] * 4, torch.float32)[0].loss.clone()


def siglip_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of the four tensors for an upstream gradient per row."""
    *forward, wanted = arguments
    a = _Arguments(*forward)
    operands, dtype = a[:2], a.image_features.dtype
    if a.empty:
        return row_results.backward_of_no_rows(*operands, wanted, dtype)
    return row_results.backward_outputs(_compute(a, grad, wanted, dtype)[0], wanted)


def siglip_reduced(*arguments: Any) -> tuple[Tensor, ...]:
    """The sum or mean over rows; the gradients of the four tensors in float32."""
    *forward, mean, wanted = arguments
    a = _Arguments(*forward)
    if a.empty:
        return row_results.reduced_of_no_rows(*a[:2], mean, wanted)
    inverse_count = 1.0 / a.image_features.shape[0] if mean else 1.0
    results, factors = _compute(a, None, wanted, torch.float32, inverse_count)
    return row_results.reduced_outputs(results, wanted, factors)
