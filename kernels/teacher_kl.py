# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""teacher_kl: loss_i = sum_k w_ik KL_ik, KL_ik = t sum_j p_ijk (log p_ijk - log q_ij).

p of teacher k and q of the student are softmax(scale X W^T / T), each model with its own width,
prototypes and scale; t is T^2 or 1. `row_softmax` walks over P once for all of them. Of what it
leaves, with expectations over p_k of logits u less their top,

    -entropy_k = E[u_k] - log sum_k        KL_k = t (-entropy_k - (E[u] - log sum))

A student that equals its teacher has KL exactly zero: both terms are then the same numbers.
`teacher_kl_rows` merges splits, one row per lane, and in the same place computes the weights of the
gate, the loss and what `gradients` wants to know of dL/dz_j = g t / T (sum_k w_k) q_j - g t / T
sum_k w_k p_jk. Teachers are a static loop: their numbers are tuples in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import checks, common, forms, gradients, row_softmax
from .common import Model, ceil_div
from .forms import Made
from .gradients import LogitGradient
from .launch import launch
from .products import entry, scale_of
from .row_softmax import merged, merged_hit


@entry
def teacher_kl_rows(
    stats_ptr,  # [splits, 1 + K, 5, N]
    scale_ptr,  # 0-d
    teacher_scales_ptr,  # [K] float32
    given_ptr,  # [N, K] float32 weights; None where a gate makes them
    target_ptr,  # [N] int64; None where the gate does not look at labels
    mask_ptr,  # [P] uint8, or None
    upstream_ptr,  # [N], or None for 1
    loss_ptr,  # [N]; None for the gradient alone
    kl_ptr,  # [N, K]
    weights_ptr,  # [N, K]
    entropy_ptr,  # [N, K]
    rows_ptr,  # [2 (1 + K), N] tops and weights; or None for the loss alone
    slopes_ptr,  # [N] share of dL/dscale
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
    c2, c, sign = scale_of(scale_ptr, inverse_temperature)
    top, sum, own, _, moves = merged(stats_ptr, 0, samples, None, c2, n, models, splits, SPLITS)
    log_sum = tl.log(sum)
    if target_ptr is not None:
        target = tl.load(target_ptr + samples)
        valid = (target >= 0) & (target < p)
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + tl.where(valid, target, 0)) != 0)
        known = tl.where(valid, 1.0, float("nan"))

    tops = ()
    teacher_sums = ()
    crosses = ()
    kls = ()
    scores = ()
    for k in tl.static_range(K):
        c2_k, c_k, _ = scale_of(teacher_scales_ptr + k, inverse_temperature)
        top_k, sum_k, own_k, other_k, _ = merged(
            stats_ptr, k + 1, samples, moves, c2_k, n, models, splits, SPLITS
        )
        log_sum_k = tl.log(sum_k)
        cross = other_k / sum_k
        information = c_k * (own_k / sum_k) - log_sum_k
        kl = t2 * (information - (c * cross - log_sum))
        tops = tops + (top_k,)
        teacher_sums = teacher_sums + (sum_k,)
        crosses = crosses + (cross,)
        kls = kls + (kl,)
        if given_ptr is not None:
            score = tl.load(given_ptr + samples * K + k)
        else:
            score = entropy_factor * information
            if target_ptr is not None:
                hit = merged_hit(stats_ptr, k + 1, samples, n, models, splits, SPLITS)
                score += label_factor * known * (c_k * (hit - top_k) - log_sum_k)
        scores = scores + (score,)
        if loss_ptr is not None:
            tl.store(kl_ptr + samples * K + k, kl, mask=inside)
            tl.store(entropy_ptr + samples * K + k, -information, mask=inside)

    weights = scores
    if given_ptr is None:
        most = scores[0]
        for k in tl.static_range(1, K):
            most = tl.maximum(most, scores[k])
        weights = ()
        whole = 0.0 * most
        for k in tl.static_range(K):
            weight = tl.exp(scores[k] - most)
            weights = weights + (weight,)
            whole += weight
    loss = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    cross = tl.zeros([ROWS], tl.float32)
    g = tl.full([ROWS], 1.0, tl.float32)
    if upstream_ptr is not None:
        g = tl.load(upstream_ptr + samples)
    g *= t2 * inverse_temperature
    n = tl.cast(n, tl.int64)
    for k in tl.static_range(K):
        weight = weights[k]
        if given_ptr is None:
            weight = weight / whole
        loss += weight * kls[k]
        total += weight
        cross += weight * crosses[k]
        if loss_ptr is not None:
            tl.store(weights_ptr + samples * K + k, weight, mask=inside)
        if rows_ptr is not None:
            tl.store(rows_ptr + (1 + k) * n + rows, tops[k], mask=inside)
            tl.store(
                rows_ptr + (2 + K + k) * n + rows, -(g * weight) / teacher_sums[k], mask=inside
            )
    if loss_ptr is not None:
        tl.store(loss_ptr + rows, loss, mask=inside)
    if rows_ptr is not None:
        tl.store(rows_ptr + rows, top, mask=inside)
        tl.store(rows_ptr + (1 + K) * n + rows, (g * total) / sum, mask=inside)
        tl.store(slopes_ptr + rows, sign * g * (total * (own / sum) - cross), mask=inside)


class _Arguments(NamedTuple):
    x: Tensor  # [N, D]
    w: Tensor  # [P, D]
    scale: Tensor  # 0-d
    teacher_x: Sequence[Tensor]  # K of [N, D_k]
    teacher_w: Sequence[Tensor]  # K of [P, D_k]
    teacher_scales: Tensor  # [K]
    weights: Tensor | None  # [N, K]
    target: Tensor | None  # [N] int64
    class_mask: Tensor | None  # [P] bool
    temperature: float
    gate_temperature: float
    gate_entropy: float
    gate_label: float
    scale_by_t2: bool


def _checked(arguments: Sequence[Any]) -> _Arguments:
    a = _Arguments(*arguments)
    checks.operands(a.x, a.w, a.scale)
    checks.teachers(a.x, a.w, a.teacher_x, a.teacher_w, a.teacher_scales, a.weights)
    checks.labels(a.x, a.w, a.target, a.class_mask)
    checks.gate(a.gate_label, a.weights, a.target)
    return a


def _made(
    a: _Arguments, upstream: Tensor | None, wanted: Sequence[bool], with_loss: bool = True
) -> Made:
    """Losses of at least one row, their details, and what the wanted gradients need."""
    models = [Model.of(u, v) for u, v in zip((a.x, *a.teacher_x), (a.w, *a.teacher_w), strict=True)]
    k = len(a.teacher_x)
    scale, teacher_scales = common.flat(a.scale), common.flat(a.teacher_scales)
    mask = common.bytes_of(a.class_mask)
    given = None if a.weights is None else common.flat(a.weights)
    target = None
    if a.target is not None and given is None and a.gate_label:
        target = a.target.contiguous()
    upstream = None if upstream is None else common.flat(upstream)
    t2 = a.temperature**2 if a.scale_by_t2 else 1.0

    def rows(first: int, last: int, stored: list[Tensor] | None) -> Made:
        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[first:last]

        n = last - first
        these = [Model(model.x[first:last], model.w) for model in models]
        found = row_softmax.statistics(
            these,
            scale,
            teacher_scales,
            class_mask=mask,
            target=part(target),
            hits=row_softmax.NO_TARGET if target is None else row_softmax.TARGET,
            temperature=a.temperature,
            stored=stored,
        )
        loss, slopes = common.empty(scale, n), common.empty(scale, n)
        kl, weights, entropy = (common.empty(scale, n, k) for _ in range(3))
        of_rows = common.empty(scale, 2 + 2 * k, n) if any(wanted) else None
        launch(
            teacher_kl_rows,
            (ceil_div(n, found.rows),),
            loss.device,
            warps=4,
            stages=1,
            **found.arguments,
            scale_ptr=scale,
            teacher_scales_ptr=teacher_scales,
            given_ptr=part(given),
            target_ptr=part(target),
            mask_ptr=mask,
            upstream_ptr=part(upstream),
            loss_ptr=loss if with_loss else None,
            kl_ptr=kl,
            weights_ptr=weights,
            entropy_ptr=entropy,
            rows_ptr=of_rows,
            slopes_ptr=slopes,
            n=n,
            p=a.w.shape[0],
            inverse_temperature=1.0 / a.temperature,
            entropy_factor=a.gate_entropy / a.gate_temperature,
            label_factor=a.gate_label / a.gate_temperature,
            t2=t2,
            K=k,
            ROWS=found.rows,
        )
        gradient = LogitGradient(
            gradients.SOFTMAX,
            these,
            scale,
            of_rows,
            teacher_scales,
            class_mask=mask,
            temperature=a.temperature,
        )
        return Made(loss, (slopes,), gradient, (kl, weights, entropy))

    return forms.make(models, wanted, rows, _peak(a, given, upstream, t2))


def _peak(a: _Arguments, given: Tensor | None, upstream: Tensor | None, t2: float) -> Tensor | None:
    """A bound of |G| where it matters, which is in float16."""
    if a.x.dtype != torch.float16:
        return None
    size = common.empty(a.x, a.x.shape[0]).fill_(t2 / a.temperature)
    if given is not None:
        size = size * given.abs().sum(1)
    if upstream is not None:
        size = size * upstream.abs()
    return size.amax()


def _details_of_no_rows(a: _Arguments) -> tuple[Tensor, ...]:
    return tuple(common.empty(a.x, 0, len(a.teacher_x)) for _ in range(3))


NONE = (False, False, False)


def teacher_kl(*arguments: Any) -> tuple[Tensor, ...]:
    """The loss of each row [N]; kl, weights, entropy [N, K]; all float32."""
    a = _checked(arguments)
    if a.x.shape[0] == 0:
        return common.empty(a.x, 0), *_details_of_no_rows(a)
    made = _made(a, None, NONE)
    return made.loss, *made.details


def teacher_kl_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    teacher_x: Sequence[Tensor],
    teacher_w: Sequence[Tensor],
    teacher_scales: Tensor,
    weights: Tensor,
    class_mask: Tensor | None,
    temperature: float,
    scale_by_t2: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dx, dw, dscale for an upstream gradient per row, the weights being what the forward used."""
    teachers = teacher_x, teacher_w, teacher_scales
    options = temperature, 1.0, 0.0, 0.0, scale_by_t2
    a = _checked((x, w, scale, *teachers, weights, None, class_mask, *options))
    checks.shape("grad", grad, x.shape[:1])
    if x.shape[0] == 0:
        return tuple(forms.without_rows(x, w, wanted, x.dtype))
    made = _made(a, grad, wanted, with_loss=False)
    return tuple(forms.backward(made, wanted, x.dtype))


def teacher_kl_reduced(*arguments: Any) -> tuple[Tensor, ...]:
    """The sum or mean over rows; kl, weights, entropy [N, K]; dx, dw, dscale in float32."""
    *forward, mean, wanted = arguments
    a = _checked(forward)
    if a.x.shape[0] == 0:
        none = forms.without_rows(a.x, a.w, wanted, torch.float32)
        return forms.total_of_no_rows(a.x, mean), *_details_of_no_rows(a), *none
    made = _made(a, None, wanted)
    total, *found = forms.reduced(made, mean, wanted)
    return total, *made.details, *found
