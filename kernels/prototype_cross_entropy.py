"""prototype_cross_entropy: loss_i = -(1 - e) log q_iy - e mean_j log q_ij.

    q_i = softmax(scale X W^T), y the target, e the label smoothing, j over the active classes
    dL/dz_ij = g_i (q_ij - (1 - e) [j = y] - e / classes), g_i the upstream gradient

`row_softmax` computes rows and G, `softmax_loss` launches it. The loss is NaN where the target is
outside [0, P) or a class that the mask excludes; no memory is read at such a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import common, row_results, row_softmax, softmax_loss, sums
from .common import Model
from .row_results import RowResults
from .sums import Factors


class _Arguments(NamedTuple):
    features: Tensor  # [N, D]
    prototypes: Tensor  # [P, D]
    scale: Tensor  # 0-d
    target: Tensor  # [N] int64
    class_mask: Tensor | None  # [P] bool
    label_smoothing: float
    ignore_index: int


def _compute(
    a: _Arguments,
    upstream: Tensor | None,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    mean: bool = False,
) -> tuple[RowResults, Factors]:
    """Losses of at least one row, and the wanted gradients in `dtype`."""
    n = a.features.shape[0]
    scale, target = common.as_float32(a.scale), a.target.contiguous()
    mask = common.as_bytes(a.class_mask)
    counted = a.label_smoothing != 0 and mask is not None
    upstream = None if upstream is None else common.as_float32(upstream)
    bound, half = None, a.features.dtype == torch.float16
    if upstream is not None and half:
        bound = upstream.masked_fill(target == a.ignore_index, 0).abs().amax()
    factors = Factors(
        scale,
        folded=not half,
        count=sums.count_rows(target, a.ignore_index) if mean else None,
        bound=bound,
    )
    with_scale = common.empty_float32(scale, n) if any(wanted) else None
    rows = row_softmax.Rows(
        row_softmax.CROSS_ENTROPY,
        [Model.of(a.features, a.prototypes)],
        scale,
        factors,
        target=target,
        class_mask=mask,
        class_count=mask.sum(dtype=torch.float32) if counted and mask is not None else None,
        upstream=upstream,
        outputs=(common.empty_float32(scale, n), None, None, None, with_scale),
        smoothing=a.label_smoothing,
        ignore_index=a.ignore_index,
        target_source=row_softmax.TARGET,
    )
    return softmax_loss.compute(rows, wanted, dtype), factors


NO_GRADIENTS = (False, False, False)


def prototype_cross_entropy(*arguments: Any) -> Tensor:
    """The loss of each row, [N] float32; 0 where the target is ignored."""
    a = _Arguments(*arguments)
    if a.features.shape[0] == 0:
        return a.features.new_empty(0, dtype=torch.float32)
    return _compute(a, None, NO_GRADIENTS, torch.float32)[0].loss


def prototype_cross_entropy_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """dX, dW, dscale for an upstream gradient per row."""
    *forward, wanted = arguments
    a = _Arguments(*forward)
    dtype = a.features.dtype
    if a.features.shape[0] == 0:
        return row_results.backward_of_no_rows(a.features, a.prototypes, wanted, dtype)
    return row_results.backward_outputs(_compute(a, grad, wanted, dtype)[0], wanted)


def prototype_cross_entropy_reduced(*arguments: Any) -> tuple[Tensor, ...]:
    """The sum or mean over the rows that are not ignored; dX, dW, dscale in float32."""
    *forward, mean, wanted = arguments
    a = _Arguments(*forward)
    if a.features.shape[0] == 0:
        return row_results.reduced_of_no_rows(a.features, a.prototypes, mean, wanted)
    results, factors = _compute(a, None, wanted, torch.float32, mean)
    return row_results.reduced_outputs(results, wanted, factors)
