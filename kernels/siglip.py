# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""siglip: loss_i = sum_j softplus(-y_ij u_ij), u = scale X W^T + bias, N x P pairs.

    y_ij = +1 where j = i + offset, else -1
    dL/du_ij = g_i (sigmoid(u_ij) - [j = i + offset]), g_i the upstream gradient

No normaliser is needed, so `row_softmax` is not used. A program of `siglip_sums` keeps a block of
rows, and streams over the tiles of W that belong to its split. It keeps three sums per row in
registers, with G for an upstream gradient of 1 and Y = X W^T:

    loss    sum_j softplus(-y_ij u_ij)
    moment  sum_j G_ij Y_ij, the contribution to dL/dscale
    total   sum_j G_ij, the contribution to dL/dbias

It writes them once, [3, splits, N], and the splits are added on the host side by torch.sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune, chunks, common, gradients, row_results, tiles
from .common import Model, ceil_div
from .gradients import LogitGradient, sigmoid_minus_match
from .launch import launch
from .products import jit_kernel, row_product
from .row_results import RowResults


@jit_kernel
def siglip_sums(
    x_ptr,  # [N, D]
    w_ptr,  # [P, D]
    x_stride,
    w_stride,
    d,
    scale_ptr,  # 0-d
    bias_ptr,  # 0-d
    offset,  # sample i matches class i + offset
    sums_ptr,  # [3, splits, N]: loss, moment, total; see above
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
    moment = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tl.cdiv(p, BLOCK_P))):
        columns = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        y = row_product(
            x_ptr, w_ptr, samples, tl.minimum(columns, p - 1).to(tl.int64), x_stride, w_stride, d,
            BLOCK_N, BLOCK_P, DEPTH, EVEN_DEPTH, False, PRECISION, UPCAST,
        )  # fmt: skip
        match = (rows + offset)[:, None] == columns[None, :]
        u = scale * y + bias
        g = sigmoid_minus_match(u, match)
        value = softplus(tl.where(match, -u, u))
        if MASKED:
            active = (columns < p)[None, :]
            g = tl.where(active, g, 0.0)
            value = tl.where(active, value, 0.0)
        loss += tl.sum(value, 1)
        moment += tl.sum(g * y, 1)
        total += tl.sum(g, 1)
    inside = rows < n
    n = tl.cast(n, tl.int64)
    to = sums_ptr + split * n + rows
    tl.store(to, loss, mask=inside)
    tl.store(to + splits * n, moment, mask=inside)
    tl.store(to + 2 * splits * n, total, mask=inside)


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


def _siglip_rows(model: Model, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """[3, N > 0]: loss, moment, total; for an upstream gradient of 1."""
    n, p = model.features.shape[0], model.prototypes.shape[0]
    device = tiles.Device.of([model])

    def run(plan: tiles.Plan) -> Tensor:
        tile, splits = plan.tile, plan.splits
        out = common.empty_float32(scale, 3, splits, n)
        launch(
            siglip_sums,
            (ceil_div(n, tile.kept), splits),
            out.device,
            tile.warps,
            tile.stages,
            x_ptr=model.features,
            w_ptr=model.prototypes,
            x_stride=model.features.stride(0),
            w_stride=model.prototypes.stride(0),
            d=model.width,
            scale_ptr=scale,
            bias_ptr=bias,
            offset=offset,
            sums_ptr=out,
            n=n,
            p=p,
            splits=splits,
            tiles_per_split=ceil_div(ceil_div(p, tile.streamed), splits),
            MASKED=p % tile.streamed != 0,
            BLOCK_N=tile.kept,
            BLOCK_P=tile.streamed,
            DEPTH=tile.depth,
            EVEN_DEPTH=model.width % tile.depth == 0,
            PRECISION=device.precision,
            UPCAST=common.upcast([model]),
        )
        return out[:, 0] if splits == 1 else out.sum(1)

    plans = tiles.row_plans(device, n, p, "sums")
    return autotune.run("siglip", device, (n, p, model.width), plans, run)


def _clamped_offset(image_features: Tensor, text_features: Tensor, offset: int) -> int:
    # Beyond these limits no row has a match, and the kernels' 32-bit integers would overflow.
    return max(-image_features.shape[0], min(offset, text_features.shape[0]))


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
) -> Tensor:
    """The loss of each row, [N] float32."""
    if image_features.shape[0] == 0 or text_features.shape[0] == 0:
        return image_features.new_zeros(image_features.shape[0], dtype=torch.float32)
    offset = _clamped_offset(image_features, text_features, offset)
    model = Model.of(image_features, text_features)
    scale, bias = common.as_float32(logit_scale), common.as_float32(logit_bias)
    return _siglip_rows(model, scale, bias, offset)[0].clone()


def siglip_backward(
    grad: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of the four tensors for an upstream gradient per row."""
    dtype = image_features.dtype
    if image_features.shape[0] == 0 or text_features.shape[0] == 0:
        empty = row_results.backward_of_no_rows(image_features, text_features, wanted, dtype)
        return tuple(empty)
    offset = _clamped_offset(image_features, text_features, offset)
    model = Model.of(image_features, text_features)
    scale, bias, grad = map(common.as_float32, (logit_scale, logit_bias, grad))
    of_scale, of_bias = grad, grad  # not used where neither is wanted
    if wanted[2] or wanted[3]:
        of_scale, of_bias = _siglip_rows(model, scale, bias, offset)[1:] * grad
    bound = gradients.pair_bound(grad, dtype)
    g = LogitGradient(gradients.SIGLIP, [model], scale, grad, bias=bias, offset=offset, bound=bound)
    products = chunks.products_of(g, wanted)
    results = RowResults(grad, (of_scale, of_bias), g, products=products)
    return tuple(row_results.backward_outputs(results, wanted, dtype))


def siglip_reduced(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    mean: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The sum or mean over rows; the gradients of the four tensors in float32."""
    if image_features.shape[0] == 0 or text_features.shape[0] == 0:
        return tuple(row_results.reduced_of_no_rows(image_features, text_features, mean, wanted))
    offset = _clamped_offset(image_features, text_features, offset)
    model = Model.of(image_features, text_features)
    scale, bias = common.as_float32(logit_scale), common.as_float32(logit_bias)
    loss, of_scale, of_bias = _siglip_rows(model, scale, bias, offset)
    g = LogitGradient(
        gradients.SIGLIP, [model], scale, torch.ones_like(loss), bias=bias, offset=offset
    )
    products = chunks.products_of(g, wanted)
    results = RowResults(loss, (of_scale, of_bias), g, products=products)
    return tuple(row_results.reduced_outputs(results, mean, wanted))
