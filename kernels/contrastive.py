# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""contrastive: loss_i = 1/2 (log sum_j exp u_ij + log sum_j exp u_ji) - u_ii, u = scale X W^T.

    dL/du_ij = 1/2 (g_i exp(u_ij - row_lse_i) + g_j exp(u_ij - column_lse_j)) - g_i [i = j]

The N rows of X match the N rows of W. `row_softmax` is launched twice, for X W^T and for W X^T,
with the diagonal as the target. A program of `contrastive_rows` keeps a few rows, combines the
splits of both statistics in registers, and writes per row the loss, both log-sum-exps and the
contribution to dL/dscale. Nothing of N x N is stored. The largest logit is subtracted before the
diagonal is, so large logits do not cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from . import chunks, common, gradients, row_results, row_softmax
from .common import Model, ceil_div, next_power_of_2
from .gradients import LogitGradient
from .launch import launch
from .products import absolute_scale, jit_kernel
from .row_results import RowResults
from .row_softmax import merge_splits, merge_target_values


@jit_kernel
def contrastive_rows(
    stats_ptr,  # [splits, 1, 5, N] of X W^T
    column_stats_ptr,  # [splits, 1, 5, N] of W X^T
    scale_ptr,  # 0-d
    loss_ptr,  # [N]
    row_lse_ptr,  # [N]
    column_lse_ptr,  # [N]
    scale_gradients_ptr,  # [N] contributions to dL/dscale for an upstream gradient of 1
    n,
    splits,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = tl.minimum(rows, n - 1).to(tl.int64)
    c2, c, sign = absolute_scale(scale_ptr, 1.0)
    top, sum, moment, _, _ = merge_splits(stats_ptr, 0, samples, None, c2, n, 1, splits, SPLITS)
    target_value = merge_target_values(stats_ptr, 0, samples, n, 1, splits, SPLITS) - top
    row_log = tl.log(sum)
    tl.store(row_lse_ptr + rows, c * top + row_log, mask=inside)
    loss = row_log - c * target_value
    scale_gradient = moment / sum - target_value

    top, sum, moment, _, _ = merge_splits(
        column_stats_ptr, 0, samples, None, c2, n, 1, splits, SPLITS
    )
    target_value = merge_target_values(column_stats_ptr, 0, samples, n, 1, splits, SPLITS) - top
    column_log = tl.log(sum)
    tl.store(column_lse_ptr + rows, c * top + column_log, mask=inside)
    tl.store(loss_ptr + rows, 0.5 * (loss + (column_log - c * target_value)), mask=inside)
    tl.store(
        scale_gradients_ptr + rows,
        sign * (0.5 * (scale_gradient + (moment / sum - target_value))),
        mask=inside,
    )


def _contrastive_rows(model: Model, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, row_lse, column_lse, scale_gradients, each [N > 0]."""
    n = model.features.shape[0]
    stats, column_stats = (
        row_softmax.statistics([one], scale, target_source=row_softmax.DIAGONAL)
        for one in (model, model.swapped())
    )
    outputs = (common.empty_float32(scale, n) for _ in range(4))
    loss, row_lse, column_lse, scale_gradients = outputs
    launch(
        contrastive_rows,
        (ceil_div(n, stats.rows_per_program),),
        scale.device,
        warps=4,
        stages=1,
        stats_ptr=stats.values,
        column_stats_ptr=column_stats.values,
        scale_ptr=scale,
        loss_ptr=loss,
        row_lse_ptr=row_lse,
        column_lse_ptr=column_lse,
        scale_gradients_ptr=scale_gradients,
        n=n,
        splits=stats.splits,
        SPLITS=next_power_of_2(stats.splits),
        ROWS=stats.rows_per_program,
    )
    return loss, row_lse, column_lse, scale_gradients


def contrastive(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor
) -> tuple[Tensor, ...]:
    """loss, row_lse, column_lse, each [N] float32."""
    if image_features.shape[0] == 0:
        return tuple(common.empty_float32(image_features, 0) for _ in range(3))
    model = Model.of(image_features, text_features)
    return _contrastive_rows(model, common.as_float32(logit_scale))[:3]


def contrastive_backward(
    grad: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of image_features, text_features, logit_scale for one upstream per row."""
    dtype = image_features.dtype
    if image_features.shape[0] == 0:
        empty = row_results.backward_of_no_rows(image_features, text_features, wanted, dtype)
        return tuple(empty)
    model, scale = Model.of(image_features, text_features), common.as_float32(logit_scale)
    grad = common.as_float32(grad)
    row_values = torch.stack([grad / 2, common.as_float32(row_lse), common.as_float32(column_lse)])
    scale_gradients = common.empty_float32(scale, 0)
    if wanted[2]:
        scale_gradients = _contrastive_rows(model, scale)[3] * grad
    bound = gradients.pair_bound(grad, dtype)
    g = LogitGradient(gradients.CONTRASTIVE, [model], scale, row_values, bound=bound)
    products = chunks.products_of(g, wanted)
    results = RowResults(grad, (scale_gradients,), g, products=products)
    return tuple(row_results.backward_outputs(results, wanted, dtype))


def contrastive_reduced(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    mean: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The sum or mean over pairs; the gradients of the three tensors in float32."""
    if image_features.shape[0] == 0:
        return tuple(row_results.reduced_of_no_rows(image_features, text_features, mean, wanted))
    model, scale = Model.of(image_features, text_features), common.as_float32(logit_scale)
    loss, row_lse, column_lse, scale_gradients = _contrastive_rows(model, scale)
    row_values = None
    if any(wanted):
        row_values = torch.stack([torch.full_like(loss, 0.5), row_lse, column_lse])
    g = LogitGradient(gradients.CONTRASTIVE, [model], scale, row_values)
    products = chunks.products_of(g, wanted)
    results = RowResults(loss, (scale_gradients,), g, products=products)
    return tuple(row_results.reduced_outputs(results, mean, wanted))
