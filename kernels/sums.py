# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Sums over rows, and sums over the parts of a result that was split over programs.

    row_totals   total = sum_i v_i, or its mean over the rows that count
    part_sums    out = f sum_s part_s    f = scale, times the factors of `result_factor`

`row_totals` is one program. It reads N values, BLOCK at a time, keeps BLOCK float32 sums in
registers, and writes one number per input. It also counts the rows of a mean. A program of
`part_sums` keeps BLOCK elements of the result in registers, reads them in every part, and writes
them once. Both add in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import ceil_div
from .launch import launch
from .products import jit_kernel


@jit_kernel
def row_totals(
    value_ptrs,  # tensors [N]; the first is the loss
    out_ptrs,  # 0-d each
    mean_factor_ptr,  # 0-d: 1 / count for a mean, 1 for a sum
    target_ptr,  # [N] int64, or None where every row counts
    ignore_index,
    n,
    COUNT: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    zero = tl.zeros([BLOCK], tl.float32)
    counted = zero
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < n
        if target_ptr is not None:
            target = tl.load(target_ptr + rows, mask=inside, other=0)
            counted += (inside & (target != ignore_index)).to(tl.float32)
        else:
            counted += inside.to(tl.float32)
    count = tl.sum(counted, 0)
    # The mean over no rows is 0 / 0 = NaN; its gradient is zero.
    mean_factor = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0) if MEAN else 1.0
    tl.store(mean_factor_ptr, mean_factor)
    for i in tl.static_range(COUNT):
        summed = zero
        for start in range(0, n, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            summed += tl.load(value_ptrs[i] + rows, mask=rows < n, other=0.0)
        total = tl.sum(summed, 0)
        if i == 0 and MEAN:
            total = total / count
        else:
            total = total * mean_factor
        tl.store(out_ptrs[i], total)


@jit_kernel
def part_sums(
    parts_ptr,  # [parts, size] float32
    out_ptr,  # [size]
    scale_ptr,  # 0-d, or None
    mean_factor_ptr,  # 0-d, or None
    bound_ptr,  # 0-d, or None; the parts were multiplied by RANGE_FACTOR / bound
    size,  # int64 where it does not fit int32
    parts,
    RANGE_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * size + at, mask=inside, other=0.0)
    factor = result_factor(scale_ptr, mean_factor_ptr, bound_ptr, RANGE_FACTOR)
    tl.store(out_ptr + at, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def range_factor_of(bound_ptr, RANGE_FACTOR: tl.constexpr):
    """The factor of G before G is rounded to half precision, which keeps it in float16's range."""
    if bound_ptr is None:
        range_factor = RANGE_FACTOR
    else:
        bound = tl.load(bound_ptr)
        range_factor = RANGE_FACTOR / tl.where(
            bound > 1e-30, bound, 1.0
        )  # a smaller bound would give infinity
    return range_factor


@triton.jit
def result_factor(scale_ptr, mean_factor_ptr, bound_ptr, RANGE_FACTOR: tl.constexpr):
    """The factor of a sum over G: it takes the range factor out, and puts the others in."""
    factor = 1.0 / RANGE_FACTOR
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr).to(tl.float32)
    if mean_factor_ptr is not None:
        factor *= tl.load(mean_factor_ptr)
    if bound_ptr is not None:
        bound = tl.load(bound_ptr)
        factor *= tl.where(bound > 1e-30, bound, 1.0)
    return factor


def totals(
    values: Sequence[Tensor],  # [N] each: the loss, then other values to sum over rows
    mean: bool,
    target: Tensor | None = None,
    ignore_index: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """The sum or mean of each of the values, and the mean factor, all 0-d; N > 0."""
    loss = values[0]
    out = [torch.empty((), dtype=torch.float32, device=loss.device) for _ in values]
    mean_factor = torch.empty_like(out[0])
    launch(
        row_totals,
        (1,),
        loss.device,
        warps=8,
        stages=1,
        value_ptrs=tuple(values),
        out_ptrs=tuple(out),
        mean_factor_ptr=mean_factor,
        target_ptr=target,
        ignore_index=ignore_index,
        n=loss.shape[0],
        COUNT=len(values),
        MEAN=mean,
        BLOCK=1024,
    )
    return out, mean_factor


def add_parts(
    parts: Tensor,  # [parts, M, D] float32
    out: Tensor,  # [M, D]
    scale: Tensor | None,
    mean_factor: Tensor | None,
    bound: Tensor | None,
    range_factor: float,
) -> None:
    """Write the sum of the parts, times the factors, to `out`."""
    launch(
        part_sums,
        (ceil_div(out.numel(), 1024),),
        out.device,
        warps=4,
        stages=1,
        parts_ptr=parts,
        out_ptr=out,
        scale_ptr=scale,
        mean_factor_ptr=mean_factor,
        bound_ptr=bound,
        size=out.numel(),
        parts=parts.shape[0],
        RANGE_FACTOR=range_factor,
        BLOCK=1024,
    )
