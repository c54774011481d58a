"""teacher_kl: loss_i = sum_k w_ik KL_ik, KL_ik = t sum_j p_ijk (log p_ijk - log q_ij).

    p of teacher k, q of the student: softmax(scale X W^T / T), each model with its own width,
    prototypes and scale; t is T^2 or 1; w are given weights, or those of a row-wise gate
    dL/dz_ij = g_i t / T ((sum_k w_ik) q_ij - sum_k w_ik p_ijk), g_i the upstream gradient

`row_softmax` computes rows and G, `softmax_loss` launches it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import common, results, softmax_loss
from .common import Model
from .row_softmax import Inputs, Numbers, Outputs, Rows
from .sums import Factors

if TYPE_CHECKING:
    from mulki.ops.operators import Request
    from mulki.ops.teacher_kl import TeacherKl


def teacher_kl(x: TeacherKl, request: Request) -> tuple[Tensor, ...]:
    leaves, n, k = x[:3], len(x.features), len(x.teacher_features)
    if n == 0:
        return results.of_nothing(request, leaves, (0,), [(0, k)] * 3)
    teachers = zip(x.teacher_features, x.teacher_prototypes, strict=True)
    models = [Model.of(*operands) for operands in ((x.features, x.prototypes), *teachers)]
    scale, upstream = common.as_float32(x.scale), results.upstream(request, n)
    weights = None if x.weights is None else common.as_float32(x.weights)
    labelled, numbers = weights is None and x.gate_label != 0, Numbers.of_kl(x)
    factors = Factors.of(
        x.features,
        scale,
        results.inverse_count(request, n),
        largest=numbers.t2 * numbers.inverse_temperature,
        upstream=upstream,
        weights=weights,
    )
    inputs = Inputs(
        scale,
        common.as_float32(torch.stack(list(x.teacher_scales))),
        common.as_bytes(x.class_mask),
        x.target.contiguous() if labelled and x.target is not None else None,
        weights,
        upstream=upstream,
    )
    details = kl, used, entropy = [common.empty_float32(scale, n, k) for _ in range(3)]
    of_scale = common.empty_float32(scale, n) if any(request.wanted) else None
    outputs = Outputs(common.empty_float32(scale, n), kl, used, entropy, of_scale)
    rows = Rows("teacher_kl", models, factors, inputs, outputs, numbers)
    return softmax_loss.compute(rows, request, leaves, details)
