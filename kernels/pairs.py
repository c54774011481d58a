# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Losses over matching pairs, u_ij = scale x_i . w_j (+ bias).

    contrastive  loss_i = 1/2 (log sum_j exp u_ij + log sum_j exp u_ji) - u_ii, N pairs
    siglip       loss_i = sum_j softplus(-y_ij u_ij), y = +1 where j = i + offset, else -1, N x P

Contrastive is row statistics of X W^T and again of W X^T, each a launch of `row_softmax` whose
target is the diagonal; `contrastive_rows` merges both, so no N x N numbers and no sums over columns
of tiles are kept. Logits are centred on the largest before the diagonal is taken away.

Siglip needs no normaliser: a program of `siglip_sums` owns rows and a split of the columns, and
keeps three sums per row: the loss, and the gradient of the logits alone and times Y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune, checks, chunks, common, forms, gradients, row_softmax, tiles
from .common import Model, ceil_div, next_power_of_2
from .forms import Made
from .gradients import LogitGradient, sigmoid_less
from .launch import launch
from .products import entry, row_product, scale_of
from .row_softmax import merged, merged_hit


@entry
def contrastive_rows(
    stats_ptr,  # [splits, 1, 5, N] of X W^T
    column_stats_ptr,  # [splits, 1, 5, N] of W X^T
    scale_ptr,  # 0-d
    loss_ptr,  # [N]
    row_lse_ptr,  # [N]
    column_lse_ptr,  # [N]
    slopes_ptr,  # [N] share of dL/dscale, for an upstream gradient of 1
    n,
    splits,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = tl.minimum(rows, n - 1).to(tl.int64)
    c2, c, sign = scale_of(scale_ptr, 1.0)
    top, sum, own, _, _ = merged(stats_ptr, 0, samples, None, c2, n, 1, splits, SPLITS)
    hit = merged_hit(stats_ptr, 0, samples, n, 1, splits, SPLITS) - top
    row_log = tl.log(sum)
    tl.store(row_lse_ptr + rows, c * top + row_log, mask=inside)
    loss = row_log - c * hit
    slope = own / sum - hit

    top, sum, own, _, _ = merged(column_stats_ptr, 0, samples, None, c2, n, 1, splits, SPLITS)
    hit = merged_hit(column_stats_ptr, 0, samples, n, 1, splits, SPLITS) - top
    column_log = tl.log(sum)
    tl.store(column_lse_ptr + rows, c * top + column_log, mask=inside)
    tl.store(loss_ptr + rows, 0.5 * (loss + (column_log - c * hit)), mask=inside)
    tl.store(slopes_ptr + rows, sign * (0.5 * (slope + (own / sum - hit))), mask=inside)


@entry
def siglip_sums(
    x_ptr,  # [N, D]
    w_ptr,  # [P, D]
    x_stride,
    w_stride,
    d,
    scale_ptr,  # 0-d
    bias_ptr,  # 0-d
    offset,  # row i matches column i + offset
    sums_ptr,  # [3, splits, N] loss, sum_j G_ij Y_ij and sum_j G_ij for an upstream gradient of 1
    n,
    p,
    splits,
    tiles_per_split,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    samples = tl.minimum(rows, n - 1).to(tl.int64)
    scale = tl.load(scale_ptr).to(tl.float32)
    bias = tl.load(bias_ptr).to(tl.float32)
    loss = tl.zeros([BLOCK_N], tl.float32)
    with_y = tl.zeros([BLOCK_N], tl.float32)
    alone = tl.zeros([BLOCK_N], tl.float32)
    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tl.cdiv(p, BLOCK_P))):
        columns = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        y = row_product(
            x_ptr, w_ptr, samples, tl.minimum(columns, p - 1).to(tl.int64), x_stride, w_stride, d,
            BLOCK_N, BLOCK_P, DEPTH, EVEN_DEPTH, False, PRECISION, UPCAST,
        )  # fmt: skip
        match = (rows + offset)[:, None] == columns[None, :]
        u = scale * y + bias
        g = sigmoid_less(u, match)
        value = softplus(tl.where(match, -u, u))
        if MASKED:
            keep = (columns < p)[None, :]
            g = tl.where(keep, g, 0.0)
            value = tl.where(keep, value, 0.0)
        loss += tl.sum(value, 1)
        with_y += tl.sum(g * y, 1)
        alone += tl.sum(g, 1)
    inside = rows < n
    n = tl.cast(n, tl.int64)
    to = sums_ptr + split * n + rows
    tl.store(to, loss, mask=inside)
    tl.store(to + splits * n, with_y, mask=inside)
    tl.store(to + 2 * splits * n, alone, mask=inside)


@triton.jit
def softplus(u):
    """log(1 + exp u), also where exp u vanishes beside 1."""
    e = tl.exp2(tl.abs(u) * -1.4426950408889634)
    whole = 1.0 + e
    # The rounding of 1 + e is made good by the factor: log1p(e) = log(whole) e / (whole - 1).
    log1p = tl.where(
        whole == 1.0, e, tl.log(whole) * (e / tl.where(whole == 1.0, 1.0, whole - 1.0))
    )
    return tl.maximum(u, 0.0) + log1p


def _contrastive_rows(model: Model, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, row_lse, column_lse, slopes, each [N > 0]."""
    n = model.x.shape[0]
    found, of_columns = (
        row_softmax.statistics([one], scale, hits=row_softmax.DIAGONAL)
        for one in (model, model.swapped())
    )
    loss, row_lse, column_lse, slopes = (common.empty(scale, n) for _ in range(4))
    launch(
        contrastive_rows,
        (ceil_div(n, found.rows),),
        scale.device,
        warps=4,
        stages=1,
        stats_ptr=found.values,
        column_stats_ptr=of_columns.values,
        scale_ptr=scale,
        loss_ptr=loss,
        row_lse_ptr=row_lse,
        column_lse_ptr=column_lse,
        slopes_ptr=slopes,
        n=n,
        splits=found.splits,
        SPLITS=next_power_of_2(found.splits),
        ROWS=found.rows,
    )
    return loss, row_lse, column_lse, slopes


def contrastive(x: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """loss, row_lse, column_lse, each [N] float32."""
    checks.pairs(x, w, scale)
    if x.shape[0] == 0:
        return tuple(common.empty(x, 0) for _ in range(3))
    return _contrastive_rows(Model.of(x, w), common.flat(scale))[:3]


def contrastive_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dx, dw, dscale for an upstream gradient per row."""
    checks.pairs(x, w, scale)
    for name, value in (("grad", grad), ("row_lse", row_lse), ("column_lse", column_lse)):
        checks.shape(name, value, x.shape[:1])
    if x.shape[0] == 0:
        return tuple(forms.without_rows(x, w, wanted, x.dtype))
    model, scale, grad = Model.of(x, w), common.flat(scale), common.flat(grad)
    rows = torch.stack([grad / 2, common.flat(row_lse), common.flat(column_lse)])
    slopes = _contrastive_rows(model, scale)[3] * grad if wanted[2] else common.empty(x, 0)
    g = LogitGradient(gradients.CONTRASTIVE, [model], scale, rows, peak=_peak(x, grad))
    made = Made(grad, (slopes,), g, products=chunks.products_of(g, wanted))
    return tuple(forms.backward(made, wanted, x.dtype))


def contrastive_reduced(
    x: Tensor, w: Tensor, scale: Tensor, mean: bool, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The sum or mean over pairs; dx, dw, dscale in float32."""
    checks.pairs(x, w, scale)
    if x.shape[0] == 0:
        none = forms.without_rows(x, w, wanted, torch.float32)
        return forms.total_of_no_rows(x, mean), *none
    model, scale = Model.of(x, w), common.flat(scale)
    loss, row_lse, column_lse, slopes = _contrastive_rows(model, scale)
    rows = torch.stack([torch.full_like(loss, 0.5), row_lse, column_lse]) if any(wanted) else None
    g = LogitGradient(gradients.CONTRASTIVE, [model], scale, rows)
    made = Made(loss, (slopes,), g, products=chunks.products_of(g, wanted))
    return tuple(forms.reduced(made, mean, wanted))


def _siglip_rows(model: Model, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """[3, N > 0]: loss, and the shares of dL/dscale and dL/dbias for an upstream gradient of 1."""
    n, p = model.x.shape[0], model.w.shape[0]
    device = tiles.Device.of([model])

    def run(plan: tiles.Plan) -> Tensor:
        tile, splits = plan.tile, plan.splits
        out = common.empty(scale, 3, splits, n)
        launch(
            siglip_sums,
            (ceil_div(n, tile.own), splits),
            out.device,
            tile.warps,
            tile.stages,
            x_ptr=model.x,
            w_ptr=model.w,
            x_stride=model.x.stride(0),
            w_stride=model.w.stride(0),
            d=model.width,
            scale_ptr=scale,
            bias_ptr=bias,
            offset=offset,
            sums_ptr=out,
            n=n,
            p=p,
            splits=splits,
            tiles_per_split=ceil_div(ceil_div(p, tile.other), splits),
            MASKED=p % tile.other != 0,
            BLOCK_N=tile.own,
            BLOCK_P=tile.other,
            DEPTH=tile.depth,
            EVEN_DEPTH=model.width % tile.depth == 0,
            PRECISION=device.precision,
            UPCAST=common.upcast([model]),
        )
        return out[:, 0] if splits == 1 else out.sum(1)

    plans = tiles.row_plans(device, n, p, "sums")
    return autotune.run("siglip", device, (n, p, model.width), plans, run)


def _shift(x: Tensor, w: Tensor, offset: int) -> int:
    # Beyond these no row has a match, and 32 bits would overflow.
    return max(-x.shape[0], min(offset, w.shape[0]))


def siglip(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """The loss of each row, [N] float32."""
    checks.biased(x, w, scale, bias)
    if x.shape[0] == 0 or w.shape[0] == 0:
        return x.new_zeros(x.shape[0], dtype=torch.float32)
    shift = _shift(x, w, offset)
    return _siglip_rows(Model.of(x, w), common.flat(scale), common.flat(bias), shift)[0].clone()


def siglip_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dx, dw, dscale, dbias for an upstream gradient per row."""
    checks.biased(x, w, scale, bias)
    checks.shape("grad", grad, x.shape[:1])
    if x.shape[0] == 0 or w.shape[0] == 0:
        return tuple(forms.without_rows(x, w, wanted, x.dtype))
    shift = _shift(x, w, offset)
    model, scale, bias, grad = Model.of(x, w), *map(common.flat, (scale, bias, grad))
    numbers = wanted[2] or wanted[3]
    slopes = _siglip_rows(model, scale, bias, shift)[1:] * grad if numbers else (grad, grad)
    g = _siglip_gradient(model, scale, bias, shift, grad, _peak(x, grad))
    made = Made(grad, (slopes[0], slopes[1]), g, products=chunks.products_of(g, wanted))
    return tuple(forms.backward(made, wanted, x.dtype))


def siglip_reduced(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int,
    mean: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The sum or mean over rows; dx, dw, dscale, dbias in float32."""
    checks.biased(x, w, scale, bias)
    if x.shape[0] == 0 or w.shape[0] == 0:
        none = forms.without_rows(x, w, wanted, torch.float32)
        return forms.total_of_no_rows(x, mean), *none
    shift = _shift(x, w, offset)
    model, scale, bias = Model.of(x, w), common.flat(scale), common.flat(bias)
    loss, of_scale, of_bias = _siglip_rows(model, scale, bias, shift)
    g = _siglip_gradient(model, scale, bias, shift, torch.ones_like(loss), None)
    made = Made(loss, (of_scale, of_bias), g, products=chunks.products_of(g, wanted))
    return tuple(forms.reduced(made, mean, wanted))


def _peak(x: Tensor, grad: Tensor) -> Tensor | None:
    """A bound of |G| where it matters, which is in float16."""
    return 2 * grad.abs().amax() if x.dtype == torch.float16 else None


def _siglip_gradient(
    model: Model, scale: Tensor, bias: Tensor, offset: int, upstream: Tensor, peak: Tensor | None
) -> LogitGradient:
    return LogitGradient(
        gradients.SIGLIP, [model], scale, upstream, bias=bias, offset=offset, peak=peak
    )
