# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Sums that end a reduced operator, and sums of the parts of a split result; in a fixed order.

`totals`: one program adds up numbers of N rows, BLOCK at a time, and writes their sums. The count
of rows behind a mean is found on the way. `add_parts`: a program owns BLOCK numbers of the result
and reads all parts of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import ceil_div
from .launch import launch
from .products import entry


@entry
def row_totals(
    value_ptrs,  # tensors [N]; the first is the loss
    out_ptrs,  # 0-d each
    share_ptr,  # 0-d: what each row counts, 1 or 1 / count
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
    # A mean over no rows is 0 / 0, and its gradient zero.
    share = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0) if MEAN else 1.0
    tl.store(share_ptr, share)
    for i in tl.static_range(COUNT):
        seen = zero
        for start in range(0, n, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            seen += tl.load(value_ptrs[i] + rows, mask=rows < n, other=0.0)
        total = tl.sum(seen, 0)
        if i == 0 and MEAN:
            total = total / count
        else:
            total = total * share
        tl.store(out_ptrs[i], total)


@entry
def part_sums(
    parts_ptr,  # [parts, size] float32
    out_ptr,  # [size]
    scale_ptr,  # 0-d, or None
    share_ptr,  # 0-d, or None
    peak_ptr,  # 0-d, or None; what the parts were divided by, times LIFT
    size,  # int64 where it does not fit int32
    parts,
    LIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * size + at, mask=inside, other=0.0)
    factor = result_factor(scale_ptr, share_ptr, peak_ptr, LIFT)
    tl.store(out_ptr + at, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def lift_of(peak_ptr, LIFT: tl.constexpr):
    """What the gradient of the logits is multiplied by before it is rounded to half precision."""
    if peak_ptr is None:
        lift = LIFT
    else:
        peak = tl.load(peak_ptr)
        lift = LIFT / tl.where(peak > 1e-30, peak, 1.0)  # a smaller one would lift to infinity
    return lift


@triton.jit
def result_factor(scale_ptr, share_ptr, peak_ptr, LIFT: tl.constexpr):
    """What a sum over gradients of logits is multiplied by in the end."""
    factor = 1.0 / LIFT
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr).to(tl.float32)
    if share_ptr is not None:
        factor *= tl.load(share_ptr)
    if peak_ptr is not None:
        peak = tl.load(peak_ptr)
        factor *= tl.where(peak > 1e-30, peak, 1.0)
    return factor


def totals(
    values: Sequence[Tensor],  # the loss [N], then what else is summed over rows
    mean: bool,
    target: Tensor | None = None,
    ignore_index: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """The sums, or means, of values and the share of one row, all 0-d; N > 0."""
    loss = values[0]
    out = [torch.empty((), dtype=torch.float32, device=loss.device) for _ in values]
    share = torch.empty_like(out[0])
    launch(
        row_totals,
        (1,),
        loss.device,
        warps=8,
        stages=1,
        value_ptrs=tuple(values),
        out_ptrs=tuple(out),
        share_ptr=share,
        target_ptr=target,
        ignore_index=ignore_index,
        n=loss.shape[0],
        COUNT=len(values),
        MEAN=mean,
        BLOCK=1024,
    )
    return out, share


def add_parts(
    parts: Tensor,  # [parts, M, D] float32
    out: Tensor,  # [M, D]
    scale: Tensor | None,
    share: Tensor | None,
    peak: Tensor | None,
    lift: float,
) -> None:
    """out = the sum of the parts, times the factors."""
    launch(
        part_sums,
        (ceil_div(out.numel(), 1024),),
        out.device,
        warps=4,
        stages=1,
        parts_ptr=parts,
        out_ptr=out,
        scale_ptr=scale,
        share_ptr=share,
        peak_ptr=peak,
        size=out.numel(),
        parts=parts.shape[0],
        LIFT=lift,
        BLOCK=1024,
    )
