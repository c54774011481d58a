# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Losses over the softmax of rows: statistics, the loss, and G, its gradient to the logits.

Model m (0 is the student, the teachers follow) has Y_m = X_m W_m^T and logits u = c Y, with
c = scale / temperature. Let v = sign(c) Y, which is largest where u is. A row has, for every model:

    top           max_j v_j
    sum           sum_j e_j, with e_j = exp(|c| (v_j - top))
    moment        sum_j e_j (v_j - top)
    cross_moment  of a teacher: sum_j e_j (v'_j - top'), v' and top' being the student's
                  of the student, with SMOOTHED: sum_j v_j
    target_value  v at the target

Differences to the top neither overflow nor cancel. The expected v under the softmax is
top + moment / sum. A teacher that equals the student has `cross_moment` equal to `moment`, bit for
bit. From these numbers a loss makes its value, and the numbers of the row in

    G = sum_m weight_m exp(|c_m| (v_m - top_m)) - uniform - at_target [j = target]

    prototype_cross_entropy  -(1 - e) log q_y - e mean_j log q_j, e the label smoothing
    teacher_kl               sum_k w_k KL_k, KL_k = t (E[log p_k] - E[log q]), E over p_k of
                             teacher k, t = T^2 or 1, w given or softmax_k of (entropy_factor
                             E[log p_k] + label_factor log p_k at the target)

Both terms of a KL are the same number where a teacher equals the student: KL is exactly zero then.

A tile has ROWS rows. Each of its lanes keeps statistics of its own columns, and lanes are combined
once, at the end, so that a tile takes no barrier for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import Model
from .products import absolute_scale
from .sums import Factors

NO_LOSS, CROSS_ENTROPY, TEACHER_KL = 0, 1, 2
NO_TARGET, TARGET, DIAGONAL = 0, 1, 2


@triton.jit
def model_scales(scale_ptr, teacher_scales_ptr, inverse_temperature, MODELS: tl.constexpr):
    """|c| log2 e, |c| and the sign of c, of every model."""
    c2, c, sign = absolute_scale(scale_ptr, inverse_temperature)
    c2s, cs, signs = (c2,), (c,), (sign,)
    for m in tl.static_range(1, MODELS):
        c2, c, sign = absolute_scale(teacher_scales_ptr + (m - 1), inverse_temperature)
        c2s, cs, signs = c2s + (c2,), cs + (c,), signs + (sign,)
    return c2s, cs, signs


@triton.jit
def active_columns(
    columns,  # [BLOCK] of the block
    offset,  # column of P at which the block starts
    p,  # columns of the block
    mask_ptr,  # [P] uint8, nonzero takes part; or None
    MASKED: tl.constexpr,  # whether some column of a tile is not active
):
    """Which columns take part, [1, BLOCK]."""
    active = tl.full([1, columns.shape[0]], 1, tl.int1)
    if MASKED:
        inside = columns < p
        if mask_ptr is not None:
            inside = inside & (tl.load(mask_ptr + offset + columns, mask=inside, other=0) != 0)
        active = inside[None, :]
    return active


@triton.jit
def first_lanes(vs, active, SMOOTHED: tl.constexpr):
    """The statistics of lanes with one column each; one that is not active has no top (-inf)."""
    tops, sums, moments, cross_moments = (), (), (), ()
    for m in tl.static_range(len(vs)):
        zero = tl.zeros_like(vs[m])
        tops = tops + (tl.where(active, vs[m], float("-inf")),)
        sums = sums + (tl.where(active, 1.0, zero),)
        moments = moments + (zero,)
        if SMOOTHED and m == 0:
            cross_moments = cross_moments + (tl.where(active, vs[m], 0.0),)
        else:
            cross_moments = cross_moments + (zero,)
    return tops, sums, moments, cross_moments


@triton.jit
def add_lanes(vs, active, c2s, tops, sums, moments, cross_moments, SMOOTHED: tl.constexpr):
    """Add a column to each lane. One of exp(old - new) and exp(v - new) is 1: it takes one exp."""
    all_tops, all_sums, all_moments, all_cross_moments = (), (), (), ()
    for m in tl.static_range(len(vs)):
        v, old = vs[m], tops[m]
        fresh = old == float("-inf")
        grows = active & ((v <= old) == 0)  # NaN grows, too
        e = tl.exp2(c2s[m] * tl.where(fresh, 0.0, -tl.abs(v - old)))
        top = tl.where(grows, v, old)
        rescale = tl.where(grows, e, 1.0)
        e = tl.where(active, tl.where(grows, 1.0, e), 0.0)
        change = tl.where(fresh, 0.0, old - top)
        below = tl.where(active, v - top, 0.0)
        cross_moment = cross_moments[m]
        if m == 0:
            student_change = change
            student_below = below
            if SMOOTHED:
                cross_moment += tl.where(active, v, 0.0)
        else:
            cross_moment = rescale * (cross_moment + sums[m] * student_change) + e * student_below
        all_tops = all_tops + (top,)
        all_sums = all_sums + (rescale * sums[m] + e,)
        all_moments = all_moments + (rescale * (moments[m] + sums[m] * change) + e * below,)
        all_cross_moments = all_cross_moments + (cross_moment,)
    return all_tops, all_sums, all_moments, all_cross_moments


@triton.jit
def combine_lanes(c2s, tops, sums, moments, cross_moments, SMOOTHED: tl.constexpr):
    """The statistics of rows from those of their lanes, along the last axis."""
    all_tops, all_sums, all_moments, all_cross_moments = (), (), (), ()
    for m in tl.static_range(len(tops)):
        top = tl.max(tops[m], 1)
        none = tops[m] == float("-inf")
        below = tl.where(none, 0.0, tops[m] - top[:, None])
        rescale = tl.where(none, 0.0, tl.exp2(c2s[m] * below))
        cross_moment = cross_moments[m]
        if m == 0:
            student_below = below
            if not SMOOTHED:
                cross_moment = tl.zeros_like(below)
        else:
            cross_moment = rescale * (cross_moment + sums[m] * student_below)
        all_tops = all_tops + (top,)
        all_sums = all_sums + (tl.sum(rescale * sums[m], 1),)
        all_moments = all_moments + (tl.sum(rescale * (moments[m] + sums[m] * below), 1),)
        all_cross_moments = all_cross_moments + (tl.sum(cross_moment, 1),)
    return all_tops, all_sums, all_moments, all_cross_moments


@triton.jit
def row_loss(
    inputs,  # of `Rows.inputs`
    outputs,  # of `Rows.outputs`
    cs,
    signs,
    statistics,  # five of every model, see above
    samples,  # [ROWS]
    inside,  # [ROWS] samples < N
    classes,  # P
    numbers,  # of `Rows.numbers`
    ignore_index,
    LOSS: tl.constexpr,
):
    """Write the loss of rows, and return the weights of the models, uniform and at_target of G."""
    _, _, mask_ptr, target_ptr, given_weights_ptr, class_count_ptr, upstream_ptr = inputs
    loss_ptr, kl_ptr, weights_ptr, entropy_ptr, scale_gradients_ptr = outputs
    tops, sums, moments, cross_moments, target_values = statistics
    inverse_temperature, entropy_factor, label_factor, t2, smoothing = numbers
    K: tl.constexpr = len(tops) - 1
    g = tl.full(samples.shape, 1.0, tl.float32)
    if upstream_ptr is not None:
        g = tl.load(upstream_ptr + samples, mask=inside, other=0.0)
    if target_ptr is not None:
        target = tl.load(target_ptr + samples, mask=inside, other=0)
        valid = (target >= 0) & (target < classes)
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + target, mask=inside & valid, other=0) != 0)
        known = tl.where(valid, 1.0, float("nan"))
    log_sum = tl.log(sums[0])
    mean = moments[0] / sums[0]
    uniform = tl.zeros_like(g)
    at_target = tl.zeros_like(g)
    weights = ()
    if LOSS == 1:
        ignored = target == ignore_index
        to_target = target_values[0] - tops[0]
        loss = -(1.0 - smoothing) * (cs[0] * to_target - log_sum)
        g = tl.where(ignored, 0.0, known * g)
        at_target = g * (1.0 - smoothing)
        scale_gradient = mean - (1.0 - smoothing) * to_target
        if class_count_ptr is not None:
            class_count = tl.load(class_count_ptr)
        else:
            class_count = tl.cast(classes, tl.float32)
        # Without smoothing the sum over v is zero, and all of these terms are.
        to_mean = cross_moments[0] / class_count - tops[0]
        loss -= smoothing * (cs[0] * to_mean - log_sum)
        scale_gradient -= smoothing * to_mean
        uniform = g * smoothing / class_count
        loss = tl.where(ignored, 0.0, loss * known)
        scale_gradient = tl.where(ignored, 0.0, g * scale_gradient)
        weights = (g / sums[0],)
    if LOSS == 2:
        scores, kls, student_means = (), (), ()
        for k in tl.static_range(K):
            log_sum_k = tl.log(sums[k + 1])
            student_mean = cross_moments[k + 1] / sums[k + 1]
            negative_entropy = cs[k + 1] * (moments[k + 1] / sums[k + 1]) - log_sum_k
            kl = t2 * (negative_entropy - (cs[0] * student_mean - log_sum))
            kls = kls + (kl,)
            student_means = student_means + (student_mean,)
            if given_weights_ptr is not None:
                score = tl.load(given_weights_ptr + samples * K + k, mask=inside, other=0.0)
            else:
                score = entropy_factor * negative_entropy
                if target_ptr is not None:
                    to_target = target_values[k + 1] - tops[k + 1]
                    score += label_factor * known * (cs[k + 1] * to_target - log_sum_k)
            scores = scores + (score,)
            if kl_ptr is not None:
                tl.store(kl_ptr + samples * K + k, kl, mask=inside)
                tl.store(entropy_ptr + samples * K + k, -negative_entropy, mask=inside)
        normalizer = tl.full(samples.shape, 1.0, tl.float32)
        if given_weights_ptr is None:
            top_score = scores[0]
            for k in tl.static_range(1, K):
                top_score = tl.maximum(top_score, scores[k])
            normalizer = 0.0 * top_score
            shares = ()
            for k in tl.static_range(K):
                share = tl.exp(scores[k] - top_score)
                normalizer += share
                shares = shares + (share,)
            scores = shares
        g *= t2 * inverse_temperature
        loss = tl.zeros_like(g)
        total = tl.zeros_like(g)
        student_mean = tl.zeros_like(g)
        of_teachers = ()
        for k in tl.static_range(K):
            weight = scores[k] / normalizer
            loss += weight * kls[k]
            total += weight
            student_mean += weight * student_means[k]
            of_teachers = of_teachers + (-(g * weight) / sums[k + 1],)
            if kl_ptr is not None:
                tl.store(weights_ptr + samples * K + k, weight, mask=inside)
        scale_gradient = g * (total * mean - student_mean)
        weights = ((g * total) / sums[0],) + of_teachers
    if LOSS != 0:
        tl.store(loss_ptr + samples, loss, mask=inside)
    if LOSS != 0 and scale_gradients_ptr is not None:
        tl.store(scale_gradients_ptr + samples, signs[0] * scale_gradient, mask=inside)
    return weights, uniform, at_target


@triton.jit
def logit_gradient(
    vs, active, columns, target, c2s, tops, weights, uniform, at_target, factor, LOSS: tl.constexpr
):
    """The tile of G times the factor."""
    g = (factor * weights[0])[:, None] * tl.exp2(c2s[0] * (vs[0] - tops[0][:, None]))
    for m in tl.static_range(1, len(vs)):
        g += (factor * weights[m])[:, None] * tl.exp2(c2s[m] * (vs[m] - tops[m][:, None]))
    if LOSS == 1:
        is_target = columns[None, :] == target[:, None]
        g -= (factor * uniform)[:, None] + tl.where(is_target, (factor * at_target)[:, None], 0.0)
    return tl.where(active, g, 0.0)


@dataclass(frozen=True)
class Form:
    """What kernels are compiled for, of a loss."""

    loss: int
    target_source: int
    smoothed: bool
    folded: bool  # whether G has its factors


@dataclass(frozen=True)
class Rows:
    """A loss over the softmax of rows, with its arguments and the tensors that it writes."""

    loss: int  # NO_LOSS, CROSS_ENTROPY or TEACHER_KL
    models: Sequence[Model]  # the student, then the teachers
    scale: Tensor  # 0-d
    factors: Factors
    teacher_scales: Tensor | None = None  # [K] float32
    given_weights: Tensor | None = None  # [N, K] float32, or None for the weights of the gate
    target: Tensor | None = None  # [N] int64
    class_mask: Tensor | None = None  # [P] uint8
    class_count: Tensor | None = None  # 0-d, number of active classes; None for P
    upstream: Tensor | None = None  # [N], or None for 1
    outputs: tuple[Tensor | None, ...] = (None,) * 5  # loss, kl, weights, entropy, scale gradients
    temperature: float = 1.0
    entropy_factor: float = 0.0  # gate_entropy / gate_temperature
    label_factor: float = 0.0  # gate_label / gate_temperature
    t2: float = 1.0  # T^2 or 1
    smoothing: float = 0.0
    ignore_index: int = 0
    target_source: int = NO_TARGET

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return (
            self.scale,
            self.teacher_scales,
            self.class_mask,
            self.target,
            self.given_weights,
            self.class_count,
            self.upstream,
        )

    @property
    def numbers(self) -> tuple[float, ...]:
        factors = self.entropy_factor, self.label_factor
        return 1.0 / self.temperature, *factors, self.t2, self.smoothing

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Those of kernels that write G."""
        return {**self.loss_arguments, "factors": self.factors.values}

    @cached_property
    def loss_arguments(self) -> dict[str, Any]:
        """Those of kernels that write the loss."""
        return {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "numbers": self.numbers,
            "ignore_index": self.ignore_index,
            "classes": self.models[0].prototypes.shape[0],
            "FORM": Form(self.loss, self.target_source, self.smoothing != 0, self.factors.folded),
        }
