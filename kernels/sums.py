# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Sums over rows, and the factors between G and the gradients.

    row_count      the rows of a mean, where some are ignored
    row_totals     total = sum_i v_i, or its mean over the rows that count
    scaled         dX and dW times the factor that their G did not have yet

The first two are one program, which keeps BLOCK float32 sums in registers and adds in a fixed
order, so that results repeat bit for bit.

dX = f G W and dW = f G^T X, where f is the scale, and 1 / count for a mean. G is multiplied by f
before it is rounded to the dtype of X. Not for float16, which has few numbers below 6e-5: there G
is multiplied so that its largest values are near 256, and the products are multiplied by what is
left of f in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import ceil_div
from .launch import launch
from .products import jit_kernel

LARGEST = tl.constexpr(256.0)  # of G in float16


class Factors(NamedTuple):
    """The factors between G for upstream gradients of one, and the gradients of X and W."""

    scale: Tensor  # 0-d
    inverse_count: float  # of the rows of a mean; 1 for a sum
    largest: float | None  # of float16: not below any |G|; None: G has its factors when written
    bound: Tensor | None = None  # 0-d, by which `largest` is multiplied; None for 1
    count: Tensor | None = None  # 0-d, the rows of a mean in place of `inverse_count`

    @classmethod
    def of(
        cls,
        features: Tensor,
        scale: Tensor,
        inverse_count: float = 1.0,
        count: Tensor | None = None,
        largest: float = 1.0,
        upstream: Tensor | None = None,
        weights: Tensor | None = None,  # [..., K] of teachers
        least: float = 0.0,
    ) -> Factors:
        """Those of a loss.

        |G| is at most `largest` times |upstream|, times the sum of |weights| of a row or `least` if
        that is more; upstream and weights are 1 where they are None.
        """
        if features.dtype != torch.float16:
            return cls(scale, inverse_count, None, None, count)
        bound = None if upstream is None else upstream.abs().nan_to_num(0.0, 0.0).amax()
        if weights is not None:
            of_weights = weights.abs().nan_to_num(0.0, 0.0).sum(-1).amax().clamp(min=least)
            bound = of_weights if bound is None else bound * of_weights
        return cls(scale, inverse_count, largest, bound, count)


@triton.jit
def logit_factor(factors):
    """The factor of G before it is written."""
    if factors.largest is None:
        factor = _scale_over_count(factors)
    else:
        factor = LARGEST / (factors.largest * _bound(factors))
    return factor


@triton.jit
def result_factor(factors):
    """The factor of a product with G."""
    if factors.largest is None:
        factor = 1.0
    else:
        factor = _scale_over_count(factors) * (factors.largest * _bound(factors)) / LARGEST
    return factor


@triton.jit
def _scale_over_count(factors):
    inverse_count = factors.inverse_count
    if factors.count is not None:
        inverse_count = 1.0 / tl.maximum(tl.load(factors.count), 1.0)
    return tl.load(factors.scale).to(tl.float32) * inverse_count


@triton.jit
def _bound(factors):
    bound = 1.0
    if factors.bound is not None:
        bound = tl.load(factors.bound)
        bound = tl.where(bound > 1e-30, bound, 1.0)  # a smaller one would give infinity
    return bound


@jit_kernel
def row_count(
    target_ptr,  # [N] int64
    out_ptr,  # 0-d float32
    ignore_index,
    n,
    BLOCK: tl.constexpr,
):
    counted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tl.cast(n, tl.int64), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + rows, mask=rows < n, other=ignore_index)
        counted += (target != ignore_index).to(tl.float32)
    tl.store(out_ptr, tl.sum(counted, 0))


@jit_kernel
def row_totals(
    value_ptrs,  # tensors [N]; the first is the loss
    out_ptrs,  # 0-d each
    count_ptr,  # 0-d, or None
    inverse_count,
    n,
    BLOCK: tl.constexpr,
):
    for i in tl.static_range(len(value_ptrs)):
        summed = tl.zeros([BLOCK], tl.float32)
        for start in range(0, tl.cast(n, tl.int64), BLOCK):
            rows = start + tl.arange(0, BLOCK)
            summed += tl.load(value_ptrs[i] + rows, mask=rows < n, other=0.0)
        total = tl.sum(summed, 0)
        if count_ptr is None:
            total *= inverse_count
        else:
            # The mean over no rows is 0 / 0 = NaN; its gradient is zero.
            count = tl.load(count_ptr)
            total /= count if i == 0 else tl.maximum(count, 1.0)
        tl.store(out_ptrs[i], total)


@triton.jit
def scaled(
    in_ptrs,  # one tensor or two, float32
    out_ptrs,
    sizes,  # int64 where they do not fit int32
    factors,  # see `Factors`
    BLOCK: tl.constexpr,
):
    factor = result_factor(factors)
    block = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(in_ptrs)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = (at >= 0) & (at < sizes[i])
        value = tl.load(in_ptrs[i] + at, mask=inside, other=0.0) * factor
        tl.store(out_ptrs[i] + at, value.to(out_ptrs[i].dtype.element_ty), mask=inside)
        block -= tl.cdiv(tl.cast(sizes[i], tl.int64), BLOCK)  # near 2^31 one more would overflow


def _block(n: int) -> dict[str, int]:
    # Few sizes, since each is a kernel to compile. 16 warps are the most that AMD's GPUs take.
    block, warps = (1024, 4) if n <= 8192 else (8192, 16)
    return {"warps": warps, "stages": 1, "BLOCK": block}


def count_rows(target: Tensor, ignore_index: int) -> Tensor:
    """How many rows are not ignored, 0-d float32."""
    out = torch.empty((), dtype=torch.float32, device=target.device)
    n = target.shape[0]
    arguments: dict[str, Any] = {"target_ptr": target, "out_ptr": out}
    launch(row_count, (1,), ignore_index=ignore_index, n=n, **_block(n), **arguments)
    return out


def totals(values: Sequence[Tensor], factors: Factors) -> list[Tensor]:
    """The sum or mean of each of the values [N > 0], 0-d; the loss is the first of them."""
    loss = values[0]
    out = [torch.empty((), dtype=torch.float32, device=loss.device) for _ in values]
    launch(
        row_totals,
        (1,),
        value_ptrs=tuple(values),
        out_ptrs=tuple(out),
        count_ptr=factors.count,
        inverse_count=factors.inverse_count,
        n=loss.shape[0],
        **_block(loss.shape[0]),
    )
    return out


def scale_results(pairs: Sequence[tuple[Tensor, Tensor]], factors: Factors) -> None:
    """Write the first of each pair, times the factors that its G did not have, to the second."""
    if not pairs:
        return
    block = 1024
    sizes = tuple(t.numel() for t, _ in pairs)
    launch(
        scaled,
        (sum(ceil_div(size, block) for size in sizes),),
        4,
        1,
        in_ptrs=tuple(t for t, _ in pairs),
        out_ptrs=tuple(to for _, to in pairs),
        sizes=sizes,
        factors=factors,
        BLOCK=block,
    )
