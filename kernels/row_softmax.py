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
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import Model
from .products import absolute_scale
from .sums import Factors

if TYPE_CHECKING:
    from mulki.ops.pair_kl import PairKl
    from mulki.ops.teacher_kl import TeacherKl


class Inputs(NamedTuple):
    """What a loss reads beside the logits; None is what it does without."""

    scale: Tensor  # 0-d
    teacher_scales: Tensor | None = None  # [K] float32
    class_mask: Tensor | None = None  # [P] uint8, nonzero takes part
    target: Tensor | None = None  # [N] int64
    weights: Tensor | None = None  # [N, K] float32, or None for those of the gate
    class_count: Tensor | None = None  # 0-d, number of active classes; None for P
    upstream: Tensor | None = None  # [N] float32, or None for 1


class Outputs(NamedTuple):
    """What a loss writes, float32."""

    loss: Tensor | None = None  # [N]
    kl: Tensor | None = None  # [N, K], as the next two
    weights: Tensor | None = None
    entropy: Tensor | None = None
    scale_gradients: Tensor | None = None  # [N] contributions to dL/dscale


class Numbers(NamedTuple):
    inverse_temperature: float = 1.0
    entropy_factor: float = 0.0  # gate_entropy / gate_temperature
    label_factor: float = 0.0  # gate_label / gate_temperature
    t2: float = 1.0  # T^2 or 1
    smoothing: float = 0.0

    @classmethod
    def of_kl(cls, x: TeacherKl | PairKl) -> Numbers:
        factors = x.gate_entropy / x.gate_temperature, x.gate_label / x.gate_temperature
        return cls(1.0 / x.temperature, *factors, x.temperature**2 if x.scale_by_t2 else 1.0)


class Operands(NamedTuple):
    """X and W of every model, for kernels that multiply them; the elements of a row contiguous."""

    x: tuple[Tensor, ...]  # [N, D_m]
    w: tuple[Tensor, ...]  # [P, D_m]
    x_strides: tuple[int, ...]
    w_strides: tuple[int, ...]
    widths: tuple[int, ...]  # D_m


class Rows(NamedTuple):
    """A loss over the softmax of rows, with its arguments and the tensors that it writes."""

    loss: str  # "cross_entropy", "teacher_kl", or "diagonal": statistics with its own target
    models: Sequence[Model]  # the student, then the teachers
    factors: Factors
    inputs: Inputs
    outputs: Outputs = Outputs()
    numbers: Numbers = Numbers()
    ignore_index: int = 0

    def arguments(self) -> dict[str, Any]:
        """Those of kernels that write the loss."""
        return {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "numbers": self.numbers,
            "ignore_index": self.ignore_index,
            "classes": self.models[0].prototypes.shape[0],
            "LOSS": self.loss,
            "SMOOTHED": self.numbers.smoothing != 0,
        }

    def operands(self) -> Operands:
        return Operands(
            x=tuple(model.features for model in self.models),
            w=tuple(model.prototypes for model in self.models),
            x_strides=tuple(model.features.stride(0) for model in self.models),
            w_strides=tuple(model.prototypes.stride(0) for model in self.models),
            widths=tuple(model.width for model in self.models),
        )


class Scales(NamedTuple):
    """Of every model c = scale / temperature, as |c| log2 e, |c| and its sign."""

    c2: Any
    c: Any
    sign: Any


@triton.jit
def model_scales(inputs, numbers, MODELS: tl.constexpr):
    """The `Scales` of a loss."""
    c2, c, sign = absolute_scale(inputs.scale, numbers.inverse_temperature)
    c2s, cs, signs = (c2,), (c,), (sign,)
    for m in tl.static_range(1, MODELS):
        teacher_scale = inputs.teacher_scales + (m - 1)
        c2, c, sign = absolute_scale(teacher_scale, numbers.inverse_temperature)
        c2s, cs, signs = c2s + (c2,), cs + (c,), signs + (sign,)
    return Scales(c2s, cs, signs)


@triton.jit
def active_columns(
    columns,  # [BLOCK] of the block
    first_column,  # column of P at which the block starts
    p,  # columns of the block
    mask_ptr,  # [P] uint8, nonzero takes part; or None
    MASKED: tl.constexpr,  # whether some column of a tile is not active
):
    """Which columns take part, [1, BLOCK]."""
    active = tl.full([1, columns.shape[0]], 1, tl.int1)
    if MASKED:
        inside = columns < p
        if mask_ptr is not None:
            mask = tl.load(mask_ptr + first_column + columns, mask=inside, other=0)
            inside = inside & (mask != 0)
        active = inside[None, :]
    return active


class RowGradient(NamedTuple):
    """The numbers of rows in G, see above."""

    weights: Any  # of every model
    uniform: Any
    at_target: Any


@triton.jit
def row_loss(
    inputs, outputs, numbers,  # of `Rows`
    scales,
    statistics,
    target_values,  # v of every model at the target
    samples,  # [ROWS]
    inside,  # [ROWS] samples < N
    classes,  # P
    ignore_index,
    LOSS: tl.constexpr,
):  # fmt: skip
    """Write the loss of rows, and return their numbers in G."""
    tops, sums, moments, cross_moments = statistics
    K: tl.constexpr = len(tops) - 1
    g = tl.full(samples.shape, 1.0, tl.float32)
    if inputs.upstream is not None:
        g = tl.load(inputs.upstream + samples, mask=inside, other=0.0)
    if inputs.target is not None:
        target = tl.load(inputs.target + samples, mask=inside, other=0)
        valid = (target >= 0) & (target < classes)
        if inputs.class_mask is not None:
            mask = tl.load(inputs.class_mask + target, mask=inside & valid, other=0)
            valid = valid & (mask != 0)
        known = tl.where(valid, 1.0, float("nan"))
    log_sum = tl.log(sums[0])
    mean = moments[0] / sums[0]
    uniform = tl.zeros_like(g)
    at_target = tl.zeros_like(g)
    weights = ()
    if LOSS == "cross_entropy":
        smoothing = numbers.smoothing
        ignored = target == ignore_index
        to_target = target_values[0] - tops[0]
        loss = -(1.0 - smoothing) * (scales.c[0] * to_target - log_sum)
        g = tl.where(ignored, 0.0, known * g)
        at_target = g * (1.0 - smoothing)
        scale_gradient = mean - (1.0 - smoothing) * to_target
        if inputs.class_count is not None:
            class_count = tl.load(inputs.class_count)
        else:
            class_count = tl.cast(classes, tl.float32)
        # Without smoothing the sum over v is zero, and all of these terms are.
        to_mean = cross_moments[0] / class_count - tops[0]
        loss -= smoothing * (scales.c[0] * to_mean - log_sum)
        scale_gradient -= smoothing * to_mean
        uniform = g * smoothing / class_count
        loss = tl.where(ignored, 0.0, loss * known)
        scale_gradient = tl.where(ignored, 0.0, g * scale_gradient)
        weights = (tl.where(ignored, 0.0, g / sums[0]),)
    if LOSS == "teacher_kl":
        scores, kls, student_means = (), (), ()
        for k in tl.static_range(K):
            log_sum_k = tl.log(sums[k + 1])
            student_mean = cross_moments[k + 1] / sums[k + 1]
            negative_entropy = scales.c[k + 1] * (moments[k + 1] / sums[k + 1]) - log_sum_k
            kl = numbers.t2 * (negative_entropy - (scales.c[0] * student_mean - log_sum))
            kls = kls + (kl,)
            student_means = student_means + (student_mean,)
            if inputs.weights is not None:
                score = tl.load(inputs.weights + samples * K + k, mask=inside, other=0.0)
            else:
                score = numbers.entropy_factor * negative_entropy
                if inputs.target is not None:
                    to_target = scales.c[k + 1] * (target_values[k + 1] - tops[k + 1])
                    score += numbers.label_factor * known * (to_target - log_sum_k)
            scores = scores + (score,)
            if outputs.kl is not None:
                tl.store(outputs.kl + samples * K + k, kl, mask=inside)
                tl.store(outputs.entropy + samples * K + k, -negative_entropy, mask=inside)
        normalizer = tl.full(samples.shape, 1.0, tl.float32)
        if inputs.weights is None:
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
        g *= numbers.t2 * numbers.inverse_temperature
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
            if outputs.weights is not None:
                tl.store(outputs.weights + samples * K + k, weight, mask=inside)
        scale_gradient = g * (total * mean - student_mean)
        weights = ((g * total) / sums[0],) + of_teachers
    if LOSS != "diagonal":
        tl.store(outputs.loss + samples, loss, mask=inside)
        if outputs.scale_gradients is not None:
            scale_gradient *= scales.sign[0]
            tl.store(outputs.scale_gradients + samples, scale_gradient, mask=inside)
    return RowGradient(weights, uniform, at_target)


@triton.jit
def logit_gradient(vs, active, columns, target, scales, tops, of_g, factor, LOSS: tl.constexpr):
    """The tile of G times the factor; `of_g` is a `RowGradient`."""
    weights, uniform, at_target = of_g
    e = tl.exp2(scales.c2[0] * (vs[0] - tops[0][:, None]))
    g = (factor * weights[0])[:, None] * e
    for m in tl.static_range(1, len(vs)):
        e = tl.exp2(scales.c2[m] * (vs[m] - tops[m][:, None]))
        g += (factor * weights[m])[:, None] * e
    if LOSS == "cross_entropy":
        is_target = columns[None, :] == target[:, None]
        g -= (factor * uniform)[:, None] + tl.where(is_target, (factor * at_target)[:, None], 0.0)
        # An ignored row has no gradient, whatever it holds; a weight that is NaN is not zero.
        active = active & (weights[0] != 0)[:, None]
    return tl.where(active, g, 0.0)
