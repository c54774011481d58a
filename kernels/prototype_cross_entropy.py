"""prototype_cross_entropy: loss_i = -(1 - e) log q_iy - e mean_j log q_ij.

    q_i = softmax(scale X W^T), y the target, e the label smoothing, j over the active classes
    dL/dz_ij = g_i (q_ij - (1 - e) [j = y] - e / classes), g_i the upstream gradient

`row_softmax` computes rows and G, `softmax_loss` launches it. The loss is NaN where the target is
outside [0, P) or a class that the mask excludes; no memory is read at such a target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import common, results, softmax_loss, sums
from .common import Model
from .row_softmax import Inputs, Numbers, Outputs, Rows
from .sums import Factors

if TYPE_CHECKING:
    from mulki.ops.operators import Request
    from mulki.ops.prototype_cross_entropy import PrototypeCrossEntropy


def prototype_cross_entropy(x: PrototypeCrossEntropy, request: Request) -> tuple[Tensor, ...]:
    leaves, n = x[:3], len(x.features)
    if n == 0:
        return results.of_nothing(request, leaves, (0,))
    scale, target = common.as_float32(x.scale), x.target.contiguous()
    mask, upstream = common.as_bytes(x.class_mask), results.upstream(request, n)
    mean, of_kept = request.reduction == "mean", upstream
    if upstream is not None and x.features.dtype == torch.float16:
        # The upstream gradient of an ignored row may be anything.
        of_kept = upstream.masked_fill(target == x.ignore_index, 0)
    count = sums.count_rows(target, x.ignore_index) if mean else None
    factors = Factors.of(x.features, scale, count=count, upstream=of_kept)
    active = mask.sum(dtype=torch.float32) if x.label_smoothing and mask is not None else None
    of_scale = common.empty_float32(scale, n) if any(request.wanted) else None
    rows = Rows(
        "cross_entropy",
        [Model.of(x.features, x.prototypes)],
        factors,
        Inputs(scale, None, mask, target, class_count=active, upstream=upstream),
        Outputs(common.empty_float32(scale, n), scale_gradients=of_scale),
        Numbers(smoothing=x.label_smoothing),
        x.ignore_index,
    )
    return softmax_loss.compute(rows, request, leaves)
