# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""teacher_kl: loss_i = sum_k w_ik KL_ik, KL_ik = t sum_j p_ijk (log p_ijk - log q_ij).

    p of teacher k, q of the student: softmax(scale X W^T / T), each model with its own width,
    prototypes and scale; t is T^2 or 1; w are given weights, or those of a row-wise gate
    dL/dz_ij = g_i t / T ((sum_k w_ik) q_ij - sum_k w_ik p_ijk), g_i the upstream gradient

`row_softmax` streams over P once for all models. Let u be logits over T less their top, and E the
expectation over p_k. The statistics then give

    -entropy_k = E[u_k] - log sum_k        KL_k = t (-entropy_k - (E[u] - log sum))

For a student that equals its teacher both terms are the same number, and KL is exactly zero.

A program of `teacher_kl_rows` keeps a few rows, and combines the splits of their statistics in
registers, with a static loop over the teachers whose values are tuples. It writes per row the loss,
per row and teacher kl, weights and entropy, and for the backward the values from which `gradients`
computes dL/dz and the contribution to dL/dscale.
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
def teacher_kl_rows(
    stats_ptr,  # [splits, 1 + K, 5, N]
    scale_ptr,  # 0-d
    teacher_scales_ptr,  # [K] float32
    given_weights_ptr,  # [N, K] float32, or None for the weights of the gate
    target_ptr,  # [N] int64, or None where gate_label is 0
    mask_ptr,  # [P] uint8, or None
    upstream_ptr,  # [N], or None for 1
    loss_ptr,  # [N]; None where only the gradient is computed
    kl_ptr,  # [N, K]
    weights_ptr,  # [N, K]
    entropy_ptr,  # [N, K]
    row_values_ptr,  # [2 (1 + K), N] tops and weights (`gradient_tile`), or None
    scale_gradients_ptr,  # [N] contributions to dL/dscale
    n,
    p,
    models,
    splits,
    inverse_temperature,
    entropy_factor,  # gate_entropy / gate_temperature
    label_factor,  # gate_label / gate_temperature
    t2,  # T^2 or 1
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = tl.minimum(rows, n - 1).to(tl.int64)
    c2, c, sign = absolute_scale(scale_ptr, inverse_temperature)
    top, sum, moment, _, changes = merge_splits(
        stats_ptr, 0, samples, None, c2, n, models, splits, SPLITS
    )
    log_sum = tl.log(sum)
    if target_ptr is not None:
        target = tl.load(target_ptr + samples)
        valid = (target >= 0) & (target < p)
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + tl.where(valid, target, 0)) != 0)
        known = tl.where(valid, 1.0, float("nan"))

    tops = ()
    teacher_sums = ()
    student_means = ()
    kls = ()
    scores = ()
    for k in tl.static_range(K):
        c2_k, c_k, _ = absolute_scale(teacher_scales_ptr + k, inverse_temperature)
        top_k, sum_k, moment_k, cross_moment_k, _ = merge_splits(
            stats_ptr, k + 1, samples, changes, c2_k, n, models, splits, SPLITS
        )
        log_sum_k = tl.log(sum_k)
        student_mean = cross_moment_k / sum_k
        negative_entropy = c_k * (moment_k / sum_k) - log_sum_k
        kl = t2 * (negative_entropy - (c * student_mean - log_sum))
        tops = tops + (top_k,)
        teacher_sums = teacher_sums + (sum_k,)
        student_means = student_means + (student_mean,)
        kls = kls + (kl,)
        if given_weights_ptr is not None:
            score = tl.load(given_weights_ptr + samples * K + k)
        else:
            score = entropy_factor * negative_entropy
            if target_ptr is not None:
                target_value = merge_target_values(
                    stats_ptr, k + 1, samples, n, models, splits, SPLITS
                )
                score += label_factor * known * (c_k * (target_value - top_k) - log_sum_k)
        scores = scores + (score,)
        if loss_ptr is not None:
            tl.store(kl_ptr + samples * K + k, kl, mask=inside)
            tl.store(entropy_ptr + samples * K + k, -negative_entropy, mask=inside)

    weights = scores
    if given_weights_ptr is None:
        top_score = scores[0]
        for k in tl.static_range(1, K):
            top_score = tl.maximum(top_score, scores[k])
        weights = ()
        normalizer = 0.0 * top_score
        for k in tl.static_range(K):
            weight = tl.exp(scores[k] - top_score)
            weights = weights + (weight,)
            normalizer += weight
    loss = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    student_mean = tl.zeros([ROWS], tl.float32)
    g = tl.full([ROWS], 1.0, tl.float32)
    if upstream_ptr is not None:
        g = tl.load(upstream_ptr + samples)
    g *= t2 * inverse_temperature
    n = tl.cast(n, tl.int64)
    for k in tl.static_range(K):
        weight = weights[k]
        if given_weights_ptr is None:
            weight = weight / normalizer
        loss += weight * kls[k]
        total += weight
        student_mean += weight * student_means[k]
        if loss_ptr is not None:
            tl.store(weights_ptr + samples * K + k, weight, mask=inside)
        if row_values_ptr is not None:
            tl.store(row_values_ptr + (1 + k) * n + rows, tops[k], mask=inside)
            tl.store(
                row_values_ptr + (2 + K + k) * n + rows,
                -(g * weight) / teacher_sums[k],
                mask=inside,
            )
    if loss_ptr is not None:
        tl.store(loss_ptr + rows, loss, mask=inside)
    if row_values_ptr is not None:
        tl.store(row_values_ptr + rows, top, mask=inside)
        tl.store(row_values_ptr + (1 + K) * n + rows, (g * total) / sum, mask=inside)
        tl.store(
            scale_gradients_ptr + rows,
            sign * g * (total * (moment / sum) - student_mean),
            mask=inside,
        )


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


def _row_results(
    a: _Arguments, upstream: Tensor | None, wanted: Sequence[bool], with_loss: bool = True
) -> RowResults:
    """Losses of at least one row, their details, and what the wanted gradients need."""
    teachers = zip(a.teacher_features, a.teacher_prototypes, strict=True)
    models = [Model.of(x, w) for x, w in ((a.features, a.prototypes), *teachers)]
    k = len(models) - 1
    scale, teacher_scales = common.as_float32(a.scale), common.as_float32(a.teacher_scales)
    mask = common.as_bytes(a.class_mask)
    given_weights = None if a.weights is None else common.as_float32(a.weights)
    target = None
    if a.target is not None and given_weights is None and a.gate_label:
        target = a.target.contiguous()
    upstream = None if upstream is None else common.as_float32(upstream)
    t2 = a.temperature**2 if a.scale_by_t2 else 1.0

    def compute_rows(first: int, last: int, logits: list[Tensor] | None) -> RowResults:
        def chunk_of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[first:last]

        n = last - first
        chunks = [Model(model.features[first:last], model.prototypes) for model in models]
        stats = row_softmax.statistics(
            chunks,
            scale,
            teacher_scales,
            class_mask=mask,
            target=chunk_of(target),
            target_source=row_softmax.NO_TARGET if target is None else row_softmax.TARGET,
            temperature=a.temperature,
            stored=logits,
        )
        loss, scale_gradients = common.empty_float32(scale, n), common.empty_float32(scale, n)
        kl, weights, entropy = (common.empty_float32(scale, n, k) for _ in range(3))
        row_values = common.empty_float32(scale, 2 + 2 * k, n) if any(wanted) else None
        launch(
            teacher_kl_rows,
            (ceil_div(n, stats.rows_per_program),),
            loss.device,
            warps=4,
            stages=1,
            **stats.arguments,
            scale_ptr=scale,
            teacher_scales_ptr=teacher_scales,
            given_weights_ptr=chunk_of(given_weights),
            target_ptr=chunk_of(target),
            mask_ptr=mask,
            upstream_ptr=chunk_of(upstream),
            loss_ptr=loss if with_loss else None,
            kl_ptr=kl,
            weights_ptr=weights,
            entropy_ptr=entropy,
            row_values_ptr=row_values,
            scale_gradients_ptr=scale_gradients,
            n=n,
            p=a.prototypes.shape[0],
            inverse_temperature=1.0 / a.temperature,
            entropy_factor=a.gate_entropy / a.gate_temperature,
            label_factor=a.gate_label / a.gate_temperature,
            t2=t2,
            K=k,
            ROWS=stats.rows_per_program,
        )
        gradient = LogitGradient(
            gradients.SOFTMAX,
            chunks,
            scale,
            row_values,
            teacher_scales,
            class_mask=mask,
            temperature=a.temperature,
        )
        return RowResults(loss, (scale_gradients,), gradient, (kl, weights, entropy))

    bound = _gradient_bound(a, given_weights, upstream, t2)
    return row_results.compute(models, wanted, compute_rows, bound)


def _gradient_bound(
    a: _Arguments, given_weights: Tensor | None, upstream: Tensor | None, t2: float
) -> Tensor | None:
    """A bound of |G|; None where G is not rounded to float16."""
    if a.features.dtype != torch.float16:
        return None
    size = common.empty_float32(a.features, a.features.shape[0]).fill_(t2 / a.temperature)
    if given_weights is not None:
        size = size * given_weights.abs().sum(1)
    if upstream is not None:
        size = size * upstream.abs()
    return size.amax()


def _details_of_no_rows(a: _Arguments) -> tuple[Tensor, ...]:
    k = len(a.teacher_features)
    return tuple(common.empty_float32(a.features, 0, k) for _ in range(3))


NO_GRADIENTS = (False, False, False)


def teacher_kl(*arguments: Any) -> tuple[Tensor, ...]:
    """The loss of each row [N]; kl, weights, entropy [N, K]; all float32."""
    a = _Arguments(*arguments)
    if a.features.shape[0] == 0:
        return common.empty_float32(a.features, 0), *_details_of_no_rows(a)
    results = _row_results(a, None, NO_GRADIENTS)
    return results.loss, *results.details


def teacher_kl_backward(
    grad: Tensor,
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    teacher_features: Sequence[Tensor],
    teacher_prototypes: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor,
    class_mask: Tensor | None,
    temperature: float,
    scale_by_t2: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dX, dW, dscale for an upstream gradient per row; `weights` as the forward returned them."""
    a = _Arguments(
        features,
        prototypes,
        scale,
        teacher_features,
        teacher_prototypes,
        teacher_scales,
        weights,
        target=None,
        class_mask=class_mask,
        temperature=temperature,
        gate_temperature=1.0,
        gate_entropy=0.0,
        gate_label=0.0,
        scale_by_t2=scale_by_t2,
    )
    dtype = features.dtype
    if features.shape[0] == 0:
        return tuple(row_results.backward_of_no_rows(features, prototypes, wanted, dtype))
    results = _row_results(a, grad, wanted, with_loss=False)
    return tuple(row_results.backward_outputs(results, wanted, dtype))


def teacher_kl_reduced(*arguments: Any) -> tuple[Tensor, ...]:
    """The sum or mean over rows; kl, weights, entropy [N, K]; dX, dW, dscale in float32."""
    *forward, mean, wanted = arguments
    a = _Arguments(*forward)
    if a.features.shape[0] == 0:
        total, *found = row_results.reduced_of_no_rows(a.features, a.prototypes, mean, wanted)
        return total, *_details_of_no_rows(a), *found
    results = _row_results(a, None, wanted)
    total, *found = row_results.reduced_outputs(results, mean, wanted)
    return total, *results.details, *found
