# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""prototype_cross_entropy: loss_i = -(1 - e) log q_iy - e mean_j log q_ij.

    q_i = softmax(scale X W^T), y the target, e the label smoothing, j over the active classes
    dL/dz_ij = g_i (q_ij - (1 - e) [j = y] - e / classes), g_i the upstream gradient

`row_softmax` streams over P. A program of `prototype_cross_entropy_rows` keeps a few rows, combines
the splits of their statistics in registers, and writes per row the loss, the values from which
`gradients` computes dL/dz, and the contribution to dL/dscale. The loss is NaN where the target is
outside [0, P) or a class that the mask excludes; no memory is read at such a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import common, gradients, row_results, row_softmax
from .common import Model, ceil_div
from .gradients import LogitGradient
from .launch import launch
from .products import absolute_scale, jit_kernel
from .row_results import RowResults
from .row_softmax import merge_splits, merge_target_values


@jit_kernel
def prototype_cross_entropy_rows(
    stats_ptr,  # [splits, 1, 5, N]
    scale_ptr,  # 0-d
    target_ptr,  # [N] int64
    mask_ptr,  # [P] uint8, or None
    class_count_ptr,  # 0-d, number of active classes; None for P
    upstream_ptr,  # [N], or None for 1
    loss_ptr,  # [N]
    row_values_ptr,  # [4, N] top, weight, uniform, at_target (`gradient_tile`), or None
    scale_gradients_ptr,  # [N] contributions to dL/dscale
    n,
    p,
    models,
    splits,
    ignore_index,
    smoothing,
    SMOOTHED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = tl.minimum(rows, n - 1).to(tl.int64)
    c2, c, sign = absolute_scale(scale_ptr, 1.0)
    top, sum, moment, total, _ = merge_splits(
        stats_ptr, 0, samples, None, c2, n, models, splits, SPLITS
    )
    target_value = merge_target_values(stats_ptr, 0, samples, n, models, splits, SPLITS)

    target = tl.load(target_ptr + samples)
    ignored = target == ignore_index
    valid = (target >= 0) & (target < p)
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + tl.where(valid, target, 0)) != 0)
    known = tl.where(valid, 1.0, float("nan"))
    log_sum = tl.log(sum)
    to_target = target_value - top
    loss = -(1.0 - smoothing) * (c * to_target - log_sum)
    if SMOOTHED:
        if class_count_ptr is None:
            class_count = tl.cast(p, tl.float32)
        else:
            class_count = tl.load(class_count_ptr)
        to_mean = total / class_count - top
        loss -= smoothing * (c * to_mean - log_sum)
    tl.store(loss_ptr + rows, tl.where(ignored, 0.0, loss * known), mask=inside)

    if row_values_ptr is not None:
        g = known
        if upstream_ptr is not None:
            g = known * tl.load(upstream_ptr + samples)
        g = tl.where(ignored, 0.0, g)
        scale_gradient = moment / sum - (1.0 - smoothing) * to_target
        uniform = 0.0 * g
        if SMOOTHED:
            scale_gradient -= smoothing * to_mean
            uniform = g * smoothing / class_count
        n = tl.cast(n, tl.int64)
        tl.store(row_values_ptr + rows, top, mask=inside)
        tl.store(row_values_ptr + n + rows, g / sum, mask=inside)
        tl.store(row_values_ptr + 2 * n + rows, uniform, mask=inside)
        tl.store(row_values_ptr + 3 * n + rows, g * (1.0 - smoothing), mask=inside)
        tl.store(
            scale_gradients_ptr + rows,
            tl.where(ignored, 0.0, sign * g * scale_gradient),
            mask=inside,
        )


class _Arguments(NamedTuple):
    features: Tensor  # [N, D]
    prototypes: Tensor  # [P, D]
    scale: Tensor  # 0-d
    target: Tensor  # [N] int64
    class_mask: Tensor | None  # [P] bool
    label_smoothing: float
    ignore_index: int


def _row_results(a: _Arguments, upstream: Tensor | None, wanted: Sequence[bool]) -> RowResults:
    """Losses of at least one row, and what the wanted gradients need."""
    model = Model.of(a.features, a.prototypes)
    scale, target = common.as_float32(a.scale), a.target.contiguous()
    mask = common.as_bytes(a.class_mask)
    smoothed = a.label_smoothing != 0
    class_count = mask.sum(dtype=torch.float32) if smoothed and mask is not None else None
    upstream = None if upstream is None else common.as_float32(upstream)
    bound = None
    if upstream is not None and a.features.dtype == torch.float16:
        bound = upstream.masked_fill(target == a.ignore_index, 0).abs().amax()

    def compute_rows(first: int, last: int, logits: list[Tensor] | None) -> RowResults:
        chunk, y = Model(model.features[first:last], model.prototypes), target[first:last]
        stats = row_softmax.statistics(
            [chunk],
            scale,
            class_mask=mask,
            target=y,
            target_source=row_softmax.TARGET,
            smoothed=smoothed,
            stored=logits,
        )
        n = last - first
        loss, scale_gradients = common.empty_float32(scale, n), common.empty_float32(scale, n)
        row_values = common.empty_float32(scale, 4, n) if any(wanted) else None
        launch(
            prototype_cross_entropy_rows,
            (ceil_div(n, stats.rows_per_program),),
            loss.device,
            warps=4,
            stages=1,
            **stats.arguments,
            scale_ptr=scale,
            target_ptr=y,
            mask_ptr=mask,
            class_count_ptr=class_count,
            upstream_ptr=None if upstream is None else upstream[first:last],
            loss_ptr=loss,
            row_values_ptr=row_values,
            scale_gradients_ptr=scale_gradients,
            n=n,
            p=a.prototypes.shape[0],
            ignore_index=a.ignore_index,
            smoothing=a.label_smoothing,
            SMOOTHED=smoothed,
            ROWS=stats.rows_per_program,
        )
        gradient = LogitGradient(
            gradients.SOFTMAX, [chunk], scale, row_values, class_mask=mask, target=y
        )
        return RowResults(loss, (scale_gradients,), gradient)

    return row_results.compute([model], wanted, compute_rows, bound)


NO_GRADIENTS = (False, False, False)


def prototype_cross_entropy(*arguments: Any) -> Tensor:
    """The loss of each row, [N] float32; 0 where the target is ignored."""
    a = _Arguments(*arguments)
    if a.features.shape[0] == 0:
        return a.features.new_empty(0, dtype=torch.float32)
    return _row_results(a, None, NO_GRADIENTS).loss


def prototype_cross_entropy_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """dX, dW, dscale for an upstream gradient per row."""
    *forward, wanted = arguments
    a = _Arguments(*forward)
    dtype = a.features.dtype
    if a.features.shape[0] == 0:
        return tuple(row_results.backward_of_no_rows(a.features, a.prototypes, wanted, dtype))
    return tuple(row_results.backward_outputs(_row_results(a, grad, wanted), wanted, dtype))


def prototype_cross_entropy_reduced(*arguments: Any) -> tuple[Tensor, ...]:
    """The sum or mean over the rows that are not ignored; dX, dW, dscale in float32."""
    *forward, mean, wanted = arguments
    a = _Arguments(*forward)
    if a.features.shape[0] == 0:
        return tuple(row_results.reduced_of_no_rows(a.features, a.prototypes, mean, wanted))
    results = _row_results(a, None, wanted)
    target = a.target.contiguous()
    return tuple(row_results.reduced_outputs(results, mean, wanted, target, a.ignore_index))
