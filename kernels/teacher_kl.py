"""teacher_kl: loss_i = sum_k w_ik KL_ik, KL_ik = t sum_j p_ijk (log p_ijk - log q_ij).

    p of teacher k, q of the student: softmax(scale X W^T / T), each model with its own width,
    prototypes and scale; t is T^2 or 1; w are given weights, or those of a row-wise gate
    dL/dz_ij = g_i t / T ((sum_k w_ik) q_ij - sum_k w_ik p_ijk), g_i the upstream gradient

`row_softmax` computes rows and G, `softmax_loss` launches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import common, row_results, row_softmax, softmax_loss
from .common import Model
from .row_results import RowResults
from .sums import Factors


class _Arguments(NamedTuple):
    features: Tensor  # [N, D]
    prototypes: Tensor  # [P, D]
    scale: Tensor  # 0-d
    teacher_features: Sequence[Tensor]  # K of [N, D_k]
    teacher_prototypes: Sequence[Tensor]  # K of [P, D_k]
    teacher_scales: Tensor  # [K]
    weights: Tensor | None  # [N, K]
    target: Tensor | None  # [N] int64
    class_mask: Tensor | None  # [P] bool
    temperature: float
    gate_temperature: float
    gate_entropy: float
    gate_label: float
    scale_by_t2: bool


def _compute(
    a: _Arguments,
    upstream: Tensor | None,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    inverse_count: float = 1.0,
    with_details: bool = True,
) -> tuple[RowResults, Factors]:
    """Losses of at least one row, their details, and the wanted gradients in `dtype`."""
    teachers = zip(a.teacher_features, a.teacher_prototypes, strict=True)
    models = [Model.of(x, w) for x, w in ((a.features, a.prototypes), *teachers)]
    n, k = a.features.shape[0], len(models) - 1
    scale = common.as_float32(a.scale)
    given_weights = None if a.weights is None else common.as_float32(a.weights)
    upstream = None if upstream is None else common.as_float32(upstream)
    labels = given_weights is None and a.gate_label != 0
    t2 = a.temperature**2 if a.scale_by_t2 else 1.0
    half = a.features.dtype == torch.float16
    factors = Factors(
        scale,
        folded=not half,
        inverse_count=inverse_count,
        bound=_gradient_bound(given_weights, upstream) if half else None,
        largest=t2 / a.temperature,
    )
    details = [common.empty_float32(scale, n, k) if with_details else None for _ in range(3)]
    rows = row_softmax.Rows(
        row_softmax.TEACHER_KL,
        models,
        scale,
        factors,
        common.as_float32(a.teacher_scales),
        given_weights,
        a.target.contiguous() if labels and a.target is not None else None,
        common.as_bytes(a.class_mask),
        upstream=upstream,
        outputs=(
            common.empty_float32(scale, n),
            *details,
            common.empty_float32(scale, n) if any(wanted) else None,
        ),
        temperature=a.temperature,
        entropy_factor=a.gate_entropy / a.gate_temperature,
        label_factor=a.gate_label / a.gate_temperature,
        t2=t2,
        target_source=row_softmax.TARGET if labels else row_softmax.NO_TARGET,
    )
    return softmax_loss.compute(rows, wanted, dtype), factors


def _gradient_bound(given_weights: Tensor | None, upstream: Tensor | None) -> Tensor | None:
    """A bound of |G| T / t, where it is not 1."""
    bound = None if given_weights is None else given_weights.abs().sum(1)
    if upstream is not None:
        bound = upstream.abs() if bound is None else bound * upstream.abs()
    return None if bound is None else bound.amax()


def _details_of_no_rows(a: _Arguments) -> tuple[Tensor, ...]:
    k = len(a.teacher_features)
    return tuple(common.empty_float32(a.features, 0, k) for _ in range(3))


NO_GRADIENTS = (False, False, False)


def teacher_kl(*arguments: Any) -> tuple[Tensor, ...]:
    """The loss of each row [N]; kl, weights, entropy [N, K]; all float32."""
    a = _Arguments(*arguments)
    if a.features.shape[0] == 0:
        return common.empty_float32(a.features, 0), *_details_of_no_rows(a)
    results, _ = _compute(a, None, NO_GRADIENTS, torch.float32)
    return results.loss, *results.details


def teacher_kl_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """dX, dW, dscale for an upstream gradient per row; `weights` as the forward returned them."""
    *models_and_weights, class_mask, temperature, scale_by_t2, wanted = arguments
    gate = 1.0, 0.0, 0.0
    rest = None, class_mask, temperature, *gate, scale_by_t2
    a = _Arguments._make((*models_and_weights, *rest))
    dtype = a.features.dtype
    if a.features.shape[0] == 0:
        return row_results.backward_of_no_rows(a.features, a.prototypes, wanted, dtype)
    results, _ = _compute(a, grad, wanted, dtype, with_details=False)
    return row_results.backward_outputs(results, wanted)


def teacher_kl_reduced(*arguments: Any) -> tuple[Tensor, ...]:
    """The sum or mean over rows; kl, weights, entropy [N, K]; dX, dW, dscale in float32."""
    *forward, mean, wanted = arguments
    a = _Arguments(*forward)
    n = a.features.shape[0]
    if n == 0:
        details = _details_of_no_rows(a)
        return row_results.reduced_of_no_rows(a.features, a.prototypes, mean, wanted, details)
    inverse_count = 1.0 / n if mean else 1.0
    results, factors = _compute(a, None, wanted, torch.float32, inverse_count)
    return row_results.reduced_outputs(results, wanted, factors)
