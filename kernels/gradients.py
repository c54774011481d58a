# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""From the gradient G [N, P] of a loss with respect to its logits to those of X and W.

    dX = f G W      dW = f G^T X      f = scale, times what else is one number for all rows

G is never stored. A program owns rows of X (of W for dW: SWAP) and walks over tiles of rows of the
other operand: it forms the products of the tile again, turns them into G by what is known of every
row, and multiplies G with the rows of the other operand. G is formed in float32 and rounded, if at
all, after that; half-precision G is lifted away from the subnormal numbers first.

`held_gradient` keeps rows x SLICE of the result in registers and forms G once per slice: "wide"
where one slice holds a whole row, else "slice". `part_gradient` ("part") forms G once for all of D
and adds its products up in scratch [rows, D] that no other program touches. Splits of the walk
write their own part each, and `sums.part_sums` adds these in order.
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
from .products import entry, row_product, scale_of
from .sums import lift_of, result_factor

SOFTMAX, CONTRASTIVE, SIGLIP, GIVEN = 0, 1, 2, 3


@triton.jit
def _along(values, OWN: tl.constexpr):
    """A vector over the rows of the tile, or over its columns."""
    if OWN:
        out = values[:, None]
    else:
        out = values[None, :]
    return out


@triton.jit
def gradient_tile(
    own_ptrs,  # models of [M, D_m]
    other_ptrs,  # models of [L, D_m]
    own_strides,
    other_strides,
    widths,
    scale_ptr,  # 0-d
    teacher_scales_ptr,  # [K], or None
    bias_ptr,  # 0-d, or None
    offset,  # SIGLIP: sample i matches class i + offset
    rows_ptr,  # [R, N] what is known of the samples; see below
    mask_ptr,  # [P] uint8, or None
    target_ptr,  # [N] int64, or None
    grad_ptr,  # GIVEN: [M, L]
    grad_own_stride,
    grad_other_stride,
    own_rows,  # [BLOCK_OWN]
    other_rows,  # [BLOCK_OTHER]
    m_own,
    m_other,
    n,
    inverse_temperature,
    lift,
    MODELS: tl.constexpr,
    LOSS: tl.constexpr,
    LABELS: tl.constexpr,
    SWAP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of G, or of its transpose where SWAP, lifted.

    SOFTMAX: sum_m weight_m exp(|c_m| (v_m - top_m)), less uniform and, at the target, less hit.
        Rows: the tops, the weights, then (LABELS) uniform and hit.
    CONTRASTIVE: h_i exp(u - row_i) + h_j exp(u - column_j) - 2 h_i [i = j]. Rows: h, row, column.
    SIGLIP: g_i (sigmoid(u) - [j = i + offset]). Rows: g.
    """
    own_32 = tl.minimum(own_rows, m_own - 1)
    other_32 = tl.minimum(other_rows, m_other - 1)
    own = own_32.to(tl.int64)
    other = other_32.to(tl.int64)
    # Numbers of samples are indexed by 32 bits from a scalar base: fewer registers.
    if SWAP:
        samples = other_32
        classes = own_32
    else:
        samples = own_32
        classes = other_32
    n = tl.cast(n, tl.int64)
    # Rows of the own operand beyond its last are not written, so nothing has to be said of them.
    keep = (other_rows < m_other)[None, :]
    if mask_ptr is not None:
        keep = keep & _along(tl.load(mask_ptr + classes) != 0, SWAP)

    if LOSS == 3:
        g = tl.load(grad_ptr + own[:, None] * grad_own_stride + other[None, :] * grad_other_stride)
        if UPCAST:
            g = g.to(tl.float32)
    else:
        y = row_product(
            own_ptrs[0], other_ptrs[0], own, other, own_strides[0], other_strides[0], widths[0],
            BLOCK_OWN, BLOCK_OTHER, DEPTH, EVEN_DEPTH, STORED, PRECISION, UPCAST,
        )  # fmt: skip
    if LOSS == 0:
        c2, _, sign = scale_of(scale_ptr, inverse_temperature)
        top = _along(tl.load(rows_ptr + samples), not SWAP)
        weight = _along(tl.load((rows_ptr + MODELS * n) + samples) * lift, not SWAP)
        g = weight * tl.exp2(c2 * (sign * y - top))
        for m in tl.static_range(1, MODELS):
            y = row_product(
                own_ptrs[m], other_ptrs[m], own, other, own_strides[m], other_strides[m], widths[m],
                BLOCK_OWN, BLOCK_OTHER, DEPTH, EVEN_DEPTH, STORED, PRECISION, UPCAST,
            )  # fmt: skip
            c2, _, sign = scale_of(teacher_scales_ptr + (m - 1), inverse_temperature)
            top = _along(tl.load((rows_ptr + m * n) + samples), not SWAP)
            weight = _along(tl.load((rows_ptr + (MODELS + m) * n) + samples) * lift, not SWAP)
            g += weight * tl.exp2(c2 * (sign * y - top))
        if LABELS:
            uniform = tl.load((rows_ptr + 2 * MODELS * n) + samples) * lift
            hit = tl.load((rows_ptr + (2 * MODELS + 1) * n) + samples) * lift
            target = tl.load(target_ptr + samples)
            here = _along(target, not SWAP) == _along(classes, SWAP)
            g -= _along(uniform, not SWAP) + tl.where(here, _along(hit, not SWAP), 0.0)
    if LOSS == 1:
        u = tl.load(scale_ptr).to(tl.float32) * y
        half = _along(tl.load(rows_ptr + samples) * lift, not SWAP)
        half_of_column = _along(tl.load(rows_ptr + classes) * lift, SWAP)
        row = _along(tl.load((rows_ptr + n) + samples), not SWAP)
        column = _along(tl.load((rows_ptr + 2 * n) + classes), SWAP)
        g = half * tl.exp2((u - row) * 1.4426950408889634)
        g += half_of_column * tl.exp2((u - column) * 1.4426950408889634)
        match = _along(samples, not SWAP) == _along(classes, SWAP)
        g -= tl.where(match, 2.0 * half, 0.0)
    if LOSS == 2:
        u = tl.load(scale_ptr).to(tl.float32) * y + tl.load(bias_ptr).to(tl.float32)
        upstream = _along(tl.load(rows_ptr + samples) * lift, not SWAP)
        match = _along(samples + offset, not SWAP) == _along(classes, SWAP)
        g = upstream * sigmoid_less(u, match)
    if MASKED:
        g = tl.where(keep, g, 0.0)
    return g


@triton.jit
def sigmoid_less(u, match):
    """sigmoid(u), less 1 where `match`, without cancellation."""
    e = tl.exp2(tl.abs(u) * -1.4426950408889634)
    whole = 1.0 / (1.0 + e)
    small = e * whole
    positive = u >= 0
    return tl.where(match, -tl.where(positive, small, whole), tl.where(positive, whole, small))


@triton.jit
def _factor_rows(
    other_ptr,  # [L, D]
    other_stride,
    norms_ptr,  # [L] what to multiply the rows with, or None
    other_rows,
    m_other,
    columns,
    d,
    UPCAST: tl.constexpr,
):
    """Rows of the other operand as the second factor of a product."""
    rows = tl.minimum(other_rows, m_other - 1).to(tl.int64)
    b = tl.load(
        other_ptr + rows[:, None] * other_stride + columns[None, :],
        mask=(columns < d)[None, :],
        other=0.0,
    )
    if UPCAST:
        b = b.to(tl.float32)
    if norms_ptr is not None:
        b = (b.to(tl.float32) * tl.load(norms_ptr + rows)[:, None]).to(b.dtype)
    return b


@entry
def held_gradient(
    own_ptrs,
    other_ptrs,
    own_strides,
    other_strides,
    widths,
    scale_ptr,
    teacher_scales_ptr,
    bias_ptr,
    offset,
    rows_ptr,
    mask_ptr,
    target_ptr,
    grad_ptr,
    grad_own_stride,
    grad_other_stride,
    norms_ptr,  # [L], or None
    factor_ptr,  # 0-d, or None; the factor of the result, other than share and peak
    share_ptr,  # 0-d, or None
    peak_ptr,  # 0-d, or None
    out_ptr,  # [M, D], or where PARTS [splits, M, D] float32
    m_own,
    m_other,
    tiles_per_split,
    inverse_temperature,
    MODELS: tl.constexpr,
    LOSS: tl.constexpr,
    LABELS: tl.constexpr,
    SWAP: tl.constexpr,
    MASKED: tl.constexpr,
    PARTS: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    own_rows = tl.program_id(0) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    columns = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    split = tl.program_id(2)
    d = widths[0]
    n = m_other if SWAP else m_own
    lift = lift_of(peak_ptr, LIFT)
    total = tl.zeros([BLOCK_OWN, SLICE], tl.float32)
    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tl.cdiv(m_other, BLOCK_OTHER))):
        other_rows = tile * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
        g = gradient_tile(
            own_ptrs, other_ptrs, own_strides, other_strides, widths, scale_ptr, teacher_scales_ptr,
            bias_ptr, offset, rows_ptr, mask_ptr, target_ptr, grad_ptr, grad_own_stride,
            grad_other_stride, own_rows, other_rows, m_own, m_other, n, inverse_temperature, lift,
            MODELS, LOSS, LABELS, SWAP, MASKED, BLOCK_OWN, BLOCK_OTHER, DEPTH, EVEN_DEPTH,
            False, PRECISION, UPCAST,
        )  # fmt: skip
        b = _factor_rows(
            other_ptrs[0], other_strides[0], norms_ptr, other_rows, m_other, columns, d, UPCAST
        )
        total = tl.dot(g.to(b.dtype), b, total, input_precision=PRECISION)
    inside = (own_rows < m_own)[:, None] & (columns < d)[None, :]
    at = own_rows[:, None].to(tl.int64) * d + columns[None, :]
    if PARTS:
        at += split.to(tl.int64) * m_own * d
    else:
        total *= result_factor(factor_ptr, share_ptr, peak_ptr, LIFT)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@entry
def part_gradient(
    own_ptrs,
    other_ptrs,
    own_strides,
    other_strides,
    widths,
    scale_ptr,
    teacher_scales_ptr,
    bias_ptr,
    offset,
    rows_ptr,
    mask_ptr,
    target_ptr,
    grad_ptr,
    grad_own_stride,
    grad_other_stride,
    norms_ptr,
    peak_ptr,
    parts_ptr,  # [splits, M, D] float32
    m_own,
    m_other,
    tiles_per_split,
    inverse_temperature,
    MODELS: tl.constexpr,
    LOSS: tl.constexpr,
    LABELS: tl.constexpr,
    SWAP: tl.constexpr,
    MASKED: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICE: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    own_rows = tl.program_id(0) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    split = tl.program_id(1)
    d = widths[0]
    n = m_other if SWAP else m_own
    lift = lift_of(peak_ptr, LIFT)
    start = split * tiles_per_split
    part_ptr = parts_ptr + split.to(tl.int64) * m_own * d
    for tile in range(start, tl.minimum(start + tiles_per_split, tl.cdiv(m_other, BLOCK_OTHER))):
        other_rows = tile * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
        g = gradient_tile(
            own_ptrs, other_ptrs, own_strides, other_strides, widths, scale_ptr, teacher_scales_ptr,
            bias_ptr, offset, rows_ptr, mask_ptr, target_ptr, grad_ptr, grad_own_stride,
            grad_other_stride, own_rows, other_rows, m_own, m_other, n, inverse_temperature, lift,
            MODELS, LOSS, LABELS, SWAP, MASKED, BLOCK_OWN, BLOCK_OTHER, DEPTH, EVEN_DEPTH,
            False, PRECISION, UPCAST,
        )  # fmt: skip
        # Not pipelined: what is read of the scratch must have been written.
        for k in tl.range(0, d, SLICE, num_stages=1):
            columns = k + tl.arange(0, SLICE)
            b = _factor_rows(
                other_ptrs[0], other_strides[0], norms_ptr, other_rows, m_other, columns, d, UPCAST
            )
            product = tl.dot(g.to(b.dtype), b, input_precision=PRECISION)
            inside = (own_rows < m_own)[:, None] & (columns < d)[None, :]
            at = part_ptr + own_rows[:, None].to(tl.int64) * d + columns[None, :]
            if tile > start:
                product += tl.load(at, mask=inside, other=0.0)
            tl.store(at, product, mask=inside)
        # The thread that reads an element of the scratch need not be the one that wrote it.
        tl.debug_barrier()


@dataclass(frozen=True)
class LogitGradient:
    """G, described."""

    loss: int
    models: Sequence[Model]  # the student, then the teachers
    scale: Tensor  # 0-d
    rows: Tensor | None = None  # [R, N] float32
    teacher_scales: Tensor | None = None  # [K] float32
    bias: Tensor | None = None  # 0-d
    offset: int = 0  # between a sample and the class it matches
    class_mask: Tensor | None = None  # [P] uint8
    target: Tensor | None = None  # [N] int64, of a loss with labels
    given: Tensor | None = None  # [N, P], G itself
    temperature: float = 1.0
    share: Tensor | None = None  # 0-d, a factor of every row
    peak: Tensor | None = None  # 0-d, a bound of |G|; None for 1

    @property
    def lift(self) -> float:
        """Keeps float16 away from the subnormal numbers."""
        half = self.models[0].x.dtype == torch.float16 and self.given is None
        return 256.0 if half else 1.0


def operand_gradient(
    g: LogitGradient,
    swap: bool,  # dW instead of dX
    dtype: torch.dtype,
    norms: Tensor | None = None,  # [rows of the other operand], factors of its rows
    scaled: bool = True,  # by the scale
) -> Tensor:
    """dX [N, D] or dW [P, D]."""
    models = [model.swapped() if swap else model for model in g.models]
    own, other, width = models[0].x, models[0].w, models[0].width
    device = tiles.Device.of(models)
    factor = g.scale if scaled else None
    given = g.given.mT if swap and g.given is not None else g.given

    def run(plan: tiles.Plan) -> Tensor:
        tile, splits = plan.tile, plan.splits
        out = own.new_empty((own.shape[0], width), dtype=dtype)
        parted = splits > 1 or plan.schedule.startswith("part")
        parts = out.new_empty((splits, *out.shape), dtype=torch.float32) if parted else None
        blocks = ceil_div(own.shape[0], tile.own)
        operands = {
            "own_ptrs": tuple(model.x for model in models),
            "other_ptrs": tuple(model.w for model in models),
            "own_strides": tuple(model.x.stride(0) for model in models),
            "other_strides": tuple(model.w.stride(0) for model in models),
            "widths": tuple(model.width for model in models),
        }
        arguments = {
            **operands,
            **loss_arguments(g),
            "grad_ptr": given,
            "grad_own_stride": 0 if given is None else given.stride(0),
            "grad_other_stride": 0 if given is None else given.stride(1),
            "norms_ptr": norms,
            "m_own": own.shape[0],
            "m_other": other.shape[0],
            "tiles_per_split": ceil_div(ceil_div(other.shape[0], tile.other), splits),
            "SWAP": swap,
            "MASKED": g.class_mask is not None or other.shape[0] % tile.other != 0,
            "BLOCK_OWN": tile.own,
            "BLOCK_OTHER": tile.other,
            "DEPTH": tile.depth,
            "SLICE": tile.slice,
            "EVEN_DEPTH": all(model.width % tile.depth == 0 for model in models),
            "PRECISION": device.precision,
            "UPCAST": common.upcast(models),
        }
        if plan.schedule.startswith("part"):
            launch(
                part_gradient,
                (blocks, splits),
                out.device,
                tile.warps,
                tile.stages,
                parts_ptr=parts,
                **arguments,
            )
        else:
            launch(
                held_gradient,
                (blocks, ceil_div(width, tile.slice), splits),
                out.device,
                tile.warps,
                tile.stages,
                factor_ptr=factor,
                share_ptr=g.share,
                out_ptr=out if parts is None else parts,
                PARTS=parts is not None,
                **arguments,
            )
        if parts is not None:
            sums.add_parts(parts, out, factor, g.share, g.peak, g.lift)
        return out

    plans = tiles.gradient_plans(device, own.shape[0], other.shape[0], width, swap)
    shape = own.shape[0], other.shape[0], width, len(models)
    kind = f"gradient {g.loss}{' swapped' if swap else ''}"
    return autotune.run(kind, device, shape, plans, run)


def loss_arguments(g: LogitGradient) -> dict[str, object]:
    """What `gradient_tile` is told of the loss."""
    return {
        "scale_ptr": g.scale,
        "teacher_scales_ptr": g.teacher_scales,
        "bias_ptr": g.bias,
        "offset": g.offset,
        "rows_ptr": g.rows,
        "mask_ptr": g.class_mask,
        "target_ptr": g.target,
        "peak_ptr": g.peak,
        "inverse_temperature": 1.0 / g.temperature,
        "MODELS": len(g.models),
        "LOSS": g.loss,
        "LABELS": g.target is not None,
        "LIFT": g.lift,
    }
