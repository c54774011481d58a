# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""The gradients of X and W from G [N, P], the gradient of a loss with respect to its logits.

    dX = f G W      dW = f G^T X      f = scale, times factors that are the same for all rows

A program keeps a block of rows of X for dX, or of W for dW (SWAP). It streams over tiles of rows of
the other operand. For each tile it computes the logits again, turns them into a tile of G from the
stored values of each row (`gradient_tile`), and multiplies G with the streamed rows. G stays in
registers and is never written. It is computed in float32; before it is rounded to half precision,
it is multiplied by the range factor of `sums`, since float16 has few small numbers.

`register_gradient` keeps kept rows x SLICE columns of the result in registers, and writes them
once. It computes G once per slice: "wide" where a slice holds a whole row, else "slice".
`scratch_gradient` ("part") computes G once for all D columns, and sums the products in a float32
scratch block [rows, D] that no other program touches. Where the streamed rows are split, each split
writes its own part of the result, and `sums.part_sums` adds the parts in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune, common, sums, tiles
from .common import Model, ceil_div
from .launch import launch
from .products import absolute_scale, jit_kernel, row_product
from .sums import range_factor_of, result_factor

SOFTMAX, CONTRASTIVE, SIGLIP, GIVEN = 0, 1, 2, 3


@triton.jit
def _broadcast(values, OVER_ROWS: tl.constexpr):
    """A vector that is broadcast: one value per row of the tile, or one per column."""
    if OVER_ROWS:
        out = values[:, None]
    else:
        out = values[None, :]
    return out


@triton.jit
def gradient_tile(
    kept_ptrs,  # models of [M, D_m]
    streamed_ptrs,  # models of [L, D_m]
    kept_strides,
    streamed_strides,
    widths,
    scale_ptr,  # 0-d
    teacher_scales_ptr,  # [K], or None
    bias_ptr,  # 0-d, or None
    offset,  # SIGLIP: sample i matches class i + offset
    row_values_ptr,  # [R, N] values of the samples; see below
    mask_ptr,  # [P] uint8, or None
    target_ptr,  # [N] int64, or None
    grad_ptr,  # GIVEN: G [M, L], M kept and L streamed rows
    grad_kept_stride,
    grad_streamed_stride,
    kept_rows,  # [BLOCK_KEPT] row numbers
    streamed_rows,  # [BLOCK_STREAMED] row numbers
    kept_count,
    streamed_count,
    n,
    inverse_temperature,
    range_factor,
    MODELS: tl.constexpr,
    LOSS: tl.constexpr,
    LABELS: tl.constexpr,
    SWAP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_STREAMED: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of G times the range factor, or of its transpose with SWAP.

    For sample i and class j, and the row values in the order in which they are stored:

    SOFTMAX      G = sum_m weight_m exp(|c_m| (v_m - top_m)) - uniform - at_target [j = target]
                 tops of the models, weights of the models; with LABELS also uniform, at_target
    CONTRASTIVE  G = h_i exp(u - row_lse_i) + h_j exp(u - column_lse_j) - 2 h_i [i = j]
                 h, row_lse, column_lse
    SIGLIP       G = g_i (sigmoid(u) - [j = i + offset])
                 g
    GIVEN        G is loaded from `grad_ptr`
    """
    kept_32 = tl.minimum(kept_rows, kept_count - 1)
    streamed_32 = tl.minimum(streamed_rows, streamed_count - 1)
    kept = kept_32.to(tl.int64)
    streamed = streamed_32.to(tl.int64)
    # Row values are indexed by 32 bits from a scalar base, which takes fewer registers.
    if SWAP:
        samples = streamed_32
        classes = kept_32
    else:
        samples = kept_32
        classes = streamed_32
    n = tl.cast(n, tl.int64)
    # Kept rows beyond the last need no mask, since their results are not written.
    active = (streamed_rows < streamed_count)[None, :]
    if mask_ptr is not None:
        active = active & _broadcast(tl.load(mask_ptr + classes) != 0, SWAP)

    if LOSS == 3:
        g = tl.load(
            grad_ptr + kept[:, None] * grad_kept_stride + streamed[None, :] * grad_streamed_stride
        )
        if UPCAST:
            g = g.to(tl.float32)
    else:
        y = row_product(
            kept_ptrs[0], streamed_ptrs[0], kept, streamed, kept_strides[0], streamed_strides[0],
            widths[0], BLOCK_KEPT, BLOCK_STREAMED, DEPTH, EVEN_DEPTH, STORED, PRECISION, UPCAST,
        )  # fmt: skip
    if LOSS == 0:
        c2, _, sign = absolute_scale(scale_ptr, inverse_temperature)
        top = _broadcast(tl.load(row_values_ptr + samples), not SWAP)
        weight = _broadcast(
            tl.load((row_values_ptr + MODELS * n) + samples) * range_factor, not SWAP
        )
        g = weight * tl.exp2(c2 * (sign * y - top))
        for m in tl.static_range(1, MODELS):
            y = row_product(
                kept_ptrs[m], streamed_ptrs[m], kept, streamed, kept_strides[m],
                streamed_strides[m], widths[m], BLOCK_KEPT, BLOCK_STREAMED, DEPTH, EVEN_DEPTH,
                STORED, PRECISION, UPCAST,
            )  # fmt: skip
            c2, _, sign = absolute_scale(teacher_scales_ptr + (m - 1), inverse_temperature)
            top = _broadcast(tl.load((row_values_ptr + m * n) + samples), not SWAP)
            weight = _broadcast(
                tl.load((row_values_ptr + (MODELS + m) * n) + samples) * range_factor, not SWAP
            )
            g += weight * tl.exp2(c2 * (sign * y - top))
        if LABELS:
            uniform = tl.load((row_values_ptr + 2 * MODELS * n) + samples) * range_factor
            at_target = tl.load((row_values_ptr + (2 * MODELS + 1) * n) + samples) * range_factor
            target = tl.load(target_ptr + samples)
            is_target = _broadcast(target, not SWAP) == _broadcast(classes, SWAP)
            g -= _broadcast(uniform, not SWAP) + tl.where(
                is_target, _broadcast(at_target, not SWAP), 0.0
            )
    if LOSS == 1:
        u = tl.load(scale_ptr).to(tl.float32) * y
        h = _broadcast(tl.load(row_values_ptr + samples) * range_factor, not SWAP)
        h_of_column = _broadcast(tl.load(row_values_ptr + classes) * range_factor, SWAP)
        row_lse = _broadcast(tl.load((row_values_ptr + n) + samples), not SWAP)
        column_lse = _broadcast(tl.load((row_values_ptr + 2 * n) + classes), SWAP)
        g = h * tl.exp2((u - row_lse) * 1.4426950408889634)
        g += h_of_column * tl.exp2((u - column_lse) * 1.4426950408889634)
        match = _broadcast(samples, not SWAP) == _broadcast(classes, SWAP)
        g -= tl.where(match, 2.0 * h, 0.0)
    if LOSS == 2:
        u = tl.load(scale_ptr).to(tl.float32) * y + tl.load(bias_ptr).to(tl.float32)
        upstream = _broadcast(tl.load(row_values_ptr + samples) * range_factor, not SWAP)
        match = _broadcast(samples + offset, not SWAP) == _broadcast(classes, SWAP)
        g = upstream * sigmoid_minus_match(u, match)
    if MASKED:
        g = tl.where(active, g, 0.0)
    return g


@triton.jit
def sigmoid_minus_match(u, match):
    """sigmoid(u), minus 1 where `match`, without cancellation."""
    e = tl.exp2(tl.abs(u) * -1.4426950408889634)
    large = 1.0 / (1.0 + e)
    small = e * large
    positive = u >= 0
    return tl.where(match, -tl.where(positive, small, large), tl.where(positive, large, small))


@triton.jit
def _streamed_tile(
    streamed_ptr,  # [L, D]
    streamed_stride,
    inverse_norms_ptr,  # [L] factors of the rows, or None
    streamed_rows,
    streamed_count,
    columns,
    d,
    UPCAST: tl.constexpr,
):
    """The streamed rows as the second factor of the product with G."""
    rows = tl.minimum(streamed_rows, streamed_count - 1).to(tl.int64)
    b = tl.load(
        streamed_ptr + rows[:, None] * streamed_stride + columns[None, :],
        mask=(columns < d)[None, :],
        other=0.0,
    )
    if UPCAST:
        b = b.to(tl.float32)
    if inverse_norms_ptr is not None:
        b = (b.to(tl.float32) * tl.load(inverse_norms_ptr + rows)[:, None]).to(b.dtype)
    return b


@jit_kernel
def register_gradient(
    kept_ptrs,
    streamed_ptrs,
    kept_strides,
    streamed_strides,
    widths,
    scale_ptr,
    teacher_scales_ptr,
    bias_ptr,
    offset,
    row_values_ptr,
    mask_ptr,
    target_ptr,
    grad_ptr,
    grad_kept_stride,
    grad_streamed_stride,
    inverse_norms_ptr,  # [L], or None
    result_scale_ptr,  # 0-d scale as a factor of the result, or None
    mean_factor_ptr,  # 0-d, or None
    bound_ptr,  # 0-d, or None
    out_ptr,  # [M, D], or where PARTS [splits, M, D] float32
    kept_count,
    streamed_count,
    tiles_per_split,
    inverse_temperature,
    MODELS: tl.constexpr,
    LOSS: tl.constexpr,
    LABELS: tl.constexpr,
    SWAP: tl.constexpr,
    MASKED: tl.constexpr,
    PARTS: tl.constexpr,
    RANGE_FACTOR: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_STREAMED: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    kept_rows = tl.program_id(0) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    split = tl.program_id(2)
    d = widths[0]
    n = streamed_count if SWAP else kept_count
    range_factor = range_factor_of(bound_ptr, RANGE_FACTOR)
    total = tl.zeros([BLOCK_KEPT, SLICE], tl.float32)
    start = split * tiles_per_split
    for tile in range(
        start, tl.minimum(start + tiles_per_split, tl.cdiv(streamed_count, BLOCK_STREAMED))
    ):
        streamed_rows = tile * BLOCK_STREAMED + tl.arange(0, BLOCK_STREAMED)
        g = gradient_tile(
            kept_ptrs, streamed_ptrs, kept_strides, streamed_strides, widths, scale_ptr,
            teacher_scales_ptr, bias_ptr, offset, row_values_ptr, mask_ptr, target_ptr, grad_ptr,
            grad_kept_stride, grad_streamed_stride, kept_rows, streamed_rows, kept_count,
            streamed_count, n, inverse_temperature, range_factor, MODELS, LOSS, LABELS, SWAP,
            MASKED, BLOCK_KEPT, BLOCK_STREAMED, DEPTH, EVEN_DEPTH, False, PRECISION, UPCAST,
        )  # fmt: skip
        b = _streamed_tile(
            streamed_ptrs[0],
            streamed_strides[0],
            inverse_norms_ptr,
            streamed_rows,
            streamed_count,
            columns,
            d,
            UPCAST,
        )
        total = tl.dot(g.to(b.dtype), b, total, input_precision=PRECISION)
    inside = (kept_rows < kept_count)[:, None] & (columns < d)[None, :]
    at = kept_rows[:, None].to(tl.int64) * d + columns[None, :]
    if PARTS:
        at += split.to(tl.int64) * kept_count * d
    else:
        total *= result_factor(result_scale_ptr, mean_factor_ptr, bound_ptr, RANGE_FACTOR)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@jit_kernel
def scratch_gradient(
    kept_ptrs,
    streamed_ptrs,
    kept_strides,
    streamed_strides,
    widths,
    scale_ptr,
    teacher_scales_ptr,
    bias_ptr,
    offset,
    row_values_ptr,
    mask_ptr,
    target_ptr,
    grad_ptr,
    grad_kept_stride,
    grad_streamed_stride,
    inverse_norms_ptr,
    bound_ptr,
    parts_ptr,  # [splits, M, D] float32
    kept_count,
    streamed_count,
    tiles_per_split,
    inverse_temperature,
    MODELS: tl.constexpr,
    LOSS: tl.constexpr,
    LABELS: tl.constexpr,
    SWAP: tl.constexpr,
    MASKED: tl.constexpr,
    RANGE_FACTOR: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_STREAMED: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    kept_rows = tl.program_id(0) * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
    split = tl.program_id(1)
    d = widths[0]
    n = streamed_count if SWAP else kept_count
    range_factor = range_factor_of(bound_ptr, RANGE_FACTOR)
    start = split * tiles_per_split
    part_ptr = parts_ptr + split.to(tl.int64) * kept_count * d
    for tile in range(
        start, tl.minimum(start + tiles_per_split, tl.cdiv(streamed_count, BLOCK_STREAMED))
    ):
        streamed_rows = tile * BLOCK_STREAMED + tl.arange(0, BLOCK_STREAMED)
        g = gradient_tile(
            kept_ptrs, streamed_ptrs, kept_strides, streamed_strides, widths, scale_ptr,
            teacher_scales_ptr, bias_ptr, offset, row_values_ptr, mask_ptr, target_ptr, grad_ptr,
            grad_kept_stride, grad_streamed_stride, kept_rows, streamed_rows, kept_count,
            streamed_count, n, inverse_temperature, range_factor, MODELS, LOSS, LABELS, SWAP,
            MASKED, BLOCK_KEPT, BLOCK_STREAMED, DEPTH, EVEN_DEPTH, False, PRECISION, UPCAST,
        )  # fmt: skip
        # Not pipelined: the scratch must have been written before it is read.
        for k in tl.range(0, d, SLICE, num_stages=1):
            columns = k + tl.arange(0, SLICE)
            b = _streamed_tile(
                streamed_ptrs[0],
                streamed_strides[0],
                inverse_norms_ptr,
                streamed_rows,
                streamed_count,
                columns,
                d,
                UPCAST,
            )
            product = tl.dot(g.to(b.dtype), b, input_precision=PRECISION)
            inside = (kept_rows < kept_count)[:, None] & (columns < d)[None, :]
            at = part_ptr + kept_rows[:, None].to(tl.int64) * d + columns[None, :]
            if tile > start:
                product += tl.load(at, mask=inside, other=0.0)
            tl.store(at, product, mask=inside)
        # Another thread of the program may read the element that this one wrote.
        tl.debug_barrier()


@dataclass(frozen=True)
class LogitGradient:
    """What G is, and what `gradient_tile` needs to compute it."""

    loss: int  # SOFTMAX, CONTRASTIVE, SIGLIP or GIVEN
    models: Sequence[Model]  # the student, then the teachers
    scale: Tensor  # 0-d
    row_values: Tensor | None = None  # [R, N] float32, see `gradient_tile`
    teacher_scales: Tensor | None = None  # [K] float32
    bias: Tensor | None = None  # 0-d
    offset: int = 0  # of SIGLIP: sample i matches class i + offset
    class_mask: Tensor | None = None  # [P] uint8
    target: Tensor | None = None  # [N] int64, where G depends on it
    given: Tensor | None = None  # [N, P], G itself, for GIVEN
    temperature: float = 1.0
    mean_factor: Tensor | None = None  # 0-d, 1 / count of a mean; None for 1
    bound: Tensor | None = None  # 0-d, not below any |G|; None for 1

    @property
    def range_factor(self) -> float:
        """Multiplies G before it is rounded: float16 has few bits below 6e-5."""
        half = self.models[0].features.dtype == torch.float16 and self.given is None
        return 256.0 if half else 1.0


def operand_gradient(
    g: LogitGradient,
    swap: bool,  # dW instead of dX
    dtype: torch.dtype,
    inverse_norms: Tensor | None = None,  # [rows of the streamed operand], factors of its rows
    scaled: bool = True,  # whether the result is multiplied by the scale
) -> Tensor:
    """dX [N, D] or dW [P, D]."""
    kept_of, streamed_of = zip(*(m.swapped() if swap else m for m in g.models), strict=True)
    kept, streamed, width = kept_of[0], streamed_of[0], g.models[0].width
    widths = tuple(model.width for model in g.models)
    device = tiles.Device.of(g.models)
    factor = g.scale if scaled else None
    given = g.given.mT if swap and g.given is not None else g.given

    def run(plan: tiles.Plan) -> Tensor:
        tile, splits = plan.tile, plan.splits
        out = kept.new_empty((kept.shape[0], width), dtype=dtype)
        in_parts = splits > 1 or plan.schedule.startswith("part")
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32) if in_parts else None
        blocks = ceil_div(kept.shape[0], tile.kept)
        arguments = {
            "kept_ptrs": kept_of,
            "streamed_ptrs": streamed_of,
            "kept_strides": tuple(operand.stride(0) for operand in kept_of),
            "streamed_strides": tuple(operand.stride(0) for operand in streamed_of),
            "widths": widths,
            **loss_arguments(g),
            "grad_ptr": given,
            "grad_kept_stride": 0 if given is None else given.stride(0),
            "grad_streamed_stride": 0 if given is None else given.stride(1),
            "inverse_norms_ptr": inverse_norms,
            "kept_count": kept.shape[0],
            "streamed_count": streamed.shape[0],
            "tiles_per_split": ceil_div(ceil_div(streamed.shape[0], tile.streamed), splits),
            "SWAP": swap,
            "MASKED": g.class_mask is not None or streamed.shape[0] % tile.streamed != 0,
            "BLOCK_KEPT": tile.kept,
            "BLOCK_STREAMED": tile.streamed,
            "DEPTH": tile.depth,
            "SLICE": tile.slice,
            "EVEN_DEPTH": all(width % tile.depth == 0 for width in widths),
            "PRECISION": device.precision,
            "UPCAST": common.upcast(g.models),
        }
        if plan.schedule.startswith("part"):
            launch(
                scratch_gradient,
                (blocks, splits),
                out.device,
                tile.warps,
                tile.stages,
                parts_ptr=parts,
                **arguments,
            )
        else:
            launch(
                register_gradient,
                (blocks, ceil_div(width, tile.slice), splits),
                out.device,
                tile.warps,
                tile.stages,
                result_scale_ptr=factor,
                mean_factor_ptr=g.mean_factor,
                out_ptr=out if parts is None else parts,
                PARTS=parts is not None,
                **arguments,
            )
        if parts is not None:
            sums.add_parts(parts, out, factor, g.mean_factor, g.bound, g.range_factor)
        return out

    plans = tiles.gradient_plans(device, kept.shape[0], streamed.shape[0], width, swap)
    shape = kept.shape[0], streamed.shape[0], width, len(g.models)
    kind = f"gradient {g.loss}{' swapped' if swap else ''}"
    return autotune.run(kind, device, shape, plans, run)


def pair_bound(grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A bound of |G| of CONTRASTIVE and SIGLIP; None where G is not rounded to float16."""
    return 2 * grad.abs().amax() if dtype == torch.float16 else None


def loss_arguments(g: LogitGradient) -> dict[str, object]:
    """The arguments of `gradient_tile` that describe G."""
    return {
        "scale_ptr": g.scale,
        "teacher_scales_ptr": g.teacher_scales,
        "bias_ptr": g.bias,
        "offset": g.offset,
        "row_values_ptr": g.row_values,
        "mask_ptr": g.class_mask,
        "target_ptr": g.target,
        "bound_ptr": g.bound,
        "inverse_temperature": 1.0 / g.temperature,
        "MODELS": len(g.models),
        "LOSS": g.loss,
        "LABELS": g.target is not None,
        "RANGE_FACTOR": g.range_factor,
    }
