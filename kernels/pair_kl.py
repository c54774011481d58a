# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""pair_kl: the distillation of N pairs in both directions, over rows and over columns.

    loss_i = 1/2 (sum_k w_ik KL_ik of row i + the same of column i), w of rows and of columns apart
    dL/dz_ij = t / 2T (g_i (a_i q_ij - sum_k w_ik p_ijk) + g_j (b_j q'_ij - sum_k w'_jk p'_ijk))

z = scale X W^T; q, p are the softmax over rows of student and teacher k, q', p' those over columns;
a and b are sums of weights. KL, gates, t and T are those of `teacher_kl`. With labels, the loss of
`contrastive` is computed from the same logits.

For each block of logits (`chunks`), `softmax_loss` is launched for its rows and for its columns,
with the own pair as the target; it writes what each direction has of the loss. `pair_kl_rows` adds
both and writes the log-sum-exps. `pair_kl_gradient` reads the logits of a block once more, and
writes G over the student's. As in `contrastive`, the logits are made again for G where they are
more than one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import autotune, common, row_results, row_softmax, schedule, softmax_loss, sums
from .chunks import Blocks, OperandGradients, PairKernel
from .common import Model, ceil_div
from .contrastive import LabelSums
from .launch import launch
from .pair_tiles import add_to_rows, log_of_columns, log_of_rows, store_gradient
from .products import absolute_scale, jit_kernel
from .row_results import RowResults
from .sums import Factors, logit_factor


@jit_kernel
def pair_kl_rows(
    state_ptr,  # [2, MODELS, 5, N] statistics of rows and of columns, see `row_softmax`
    scale_ptr,  # 0-d
    teacher_scales_ptr,  # [K]
    sides_ptr,  # [2, N] losses of rows and of columns
    loss_ptr,  # [N]
    lse_ptr,  # [2, MODELS, N, 2], the log-sum-exp as the sum of two numbers
    inverse_temperature,
    n,
    MODELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    for m in tl.static_range(MODELS):
        of_model = scale_ptr if m == 0 else teacher_scales_ptr + (m - 1)
        _, c, _ = absolute_scale(of_model, inverse_temperature)
        for side in tl.static_range(2):
            at = state_ptr + (side * MODELS + m) * 5 * n + rows
            to = lse_ptr + ((side * MODELS + m) * n + rows) * 2
            tl.store(to, c * tl.load(at, mask=inside, other=0.0), mask=inside)
            tl.store(to + 1, tl.log(tl.load(at + n, mask=inside, other=1.0)), mask=inside)
    loss = tl.load(sides_ptr + rows, mask=inside, other=0.0)
    loss += tl.load(sides_ptr + n + rows, mask=inside, other=0.0)
    tl.store(loss_ptr + rows, 0.5 * loss, mask=inside)


@jit_kernel
def pair_kl_gradient(
    y_ptr,  # [n', S] float32, of the student
    row_stride,
    g_ptr,  # [n', *] in the dtype of X, or None
    g_stride,
    teacher_y_ptrs,  # K of [n', S]
    inputs,  # see `_gradient`
    scale_gradients_ptr,  # [N] contributions to dL/dscale
    factors,  # see `Factors.values`
    first,  # the first row
    offset,  # the first column
    n,  # rows of the block
    p,  # columns of the block
    loaded,  # columns that may be read
    classes,  # N
    numbers,  # 1 / temperature, t / temperature
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    FOLDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    scale_ptr, teacher_scales_ptr, upstream_ptr, weights_ptr, lse_ptr, row_ptr, column_ptr = inputs
    K: tl.constexpr = len(teacher_y_ptrs)
    total = tl.cast(classes, tl.int64)
    scale = tl.load(scale_ptr).to(tl.float32)
    factor = logit_factor(factors, FOLDED)
    for i in tl.range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0), disable_licm=True):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        samples = first + rows.to(tl.int64)
        of_rows = tl.full([ROWS], 0.5, tl.float32)
        if upstream_ptr is not None:
            of_rows *= tl.load(upstream_ptr + samples, mask=inside, other=0.0)
        moment = tl.zeros([ROWS, BLOCK_P], tl.float32)
        places = rows.to(tl.int64)[:, None] * row_stride
        for start in tl.range(0, p, BLOCK_P, num_stages=1):
            columns = start + tl.arange(0, BLOCK_P)
            within = columns < p
            read = (columns < loaded)[None, :]
            pairs = offset + columns.to(tl.int64)
            of_columns = tl.full([BLOCK_P], 0.5, tl.float32)
            if upstream_ptr is not None:
                of_columns *= tl.load(upstream_ptr + pairs, mask=within, other=0.0)
            y = tl.load(y_ptr + places + columns[None, :], mask=read, other=0.0)
            row_weight = tl.zeros([ROWS], tl.float32)
            column_weight = tl.zeros([BLOCK_P], tl.float32)
            # Apart, for a student that equals its teacher: each of the two is zero then.
            g_rows = tl.zeros([ROWS, BLOCK_P], tl.float32)
            g_columns = tl.zeros([ROWS, BLOCK_P], tl.float32)
            for k in tl.static_range(K):
                v = tl.load(teacher_y_ptrs[k] + places + columns[None, :], mask=read, other=0.0)
                c = tl.load(teacher_scales_ptr + k) * numbers[0]
                at = weights_ptr + samples * K + k
                w = tl.load(at, mask=inside, other=0.0)
                row_weight += w
                to = lse_ptr + (k + 1) * total * 2
                g_rows -= (of_rows * w)[:, None] * tl.exp2(log_of_rows(c * v, to, samples, inside))
                at = weights_ptr + (total + pairs) * K + k
                w = tl.load(at, mask=within, other=0.0)
                column_weight += w
                to += (K + 1) * total * 2
                g_columns -= (of_columns * w)[None, :] * tl.exp2(
                    log_of_columns(c * v, to, pairs, within)
                )
            u = (scale * numbers[0]) * y
            of_row = tl.exp2(log_of_rows(u, lse_ptr, samples, inside))
            of_column = tl.exp2(log_of_columns(u, lse_ptr + (K + 1) * total * 2, pairs, within))
            g_rows += (of_rows * row_weight)[:, None] * of_row
            g_columns += (of_columns * column_weight)[None, :] * of_column
            g = numbers[1] * (g_rows + g_columns)
            if row_ptr is not None:
                g += 0.5 * tl.exp2(log_of_rows(scale * y, row_ptr, samples, inside))
                g += 0.5 * tl.exp2(log_of_columns(scale * y, column_ptr, pairs, within))
                g -= tl.where(samples[:, None] == pairs[None, :], 1.0, 0.0)
            of_scale = g * y
            if MASKED:
                g = tl.where(within[None, :], g, 0.0)
                of_scale = tl.where(within[None, :], of_scale, 0.0)
            moment += of_scale
            if g_ptr is not None:
                store_gradient(g_ptr, g_stride, rows, columns, factor * g, loaded, EVEN)
        before = rows < tl.where(offset > 0, n, 0)
        add_to_rows(scale_gradients_ptr, samples, inside, before, tl.sum(moment, 1))


class _Arguments(NamedTuple):
    image_features: Tensor  # [N, D]
    text_features: Tensor  # [N, D]
    scale: Tensor  # 0-d
    teacher_image_features: Sequence[Tensor]  # K of [N, D_k]
    teacher_text_features: Sequence[Tensor]  # K of [N, D_k]
    teacher_scales: Tensor  # [K]
    weights: Tensor | None  # [2, N, K]
    temperature: float
    gate_temperature: float
    gate_entropy: float
    gate_label: float
    scale_by_t2: bool

    @property
    def n(self) -> int:
        return self.image_features.shape[0]

    @property
    def t2(self) -> float:
        return self.temperature**2 if self.scale_by_t2 else 1.0

    @property
    def models(self) -> list[Model]:
        student = self.image_features, self.text_features
        teachers = zip(self.teacher_image_features, self.teacher_text_features, strict=True)
        return [Model.of(x, w) for x, w in (student, *teachers)]


class _Found(NamedTuple):
    """What is known of the pairs, before or after the first pass."""

    loss: Tensor  # [N]
    kl: Tensor  # [2, N, K], as the next two
    weights: Tensor
    entropy: Tensor
    lse: Tensor  # [2, 1 + K, N, 2]
    labels: LabelSums | None = None


def _compute(
    a: _Arguments,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    upstream: Tensor | None = None,
    lse: Tensor | None = None,  # where it is known, as the weights are
    inverse_count: float = 1.0,
    labels: bool = False,
) -> tuple[_Found, RowResults, Factors]:
    """Of at least one pair: what was found of it, and the wanted gradients in `dtype`."""
    models, scale, n = a.models, common.as_float32(a.scale), a.n
    weights = None if a.weights is None else common.as_float32(a.weights)
    half = a.image_features.dtype == torch.float16
    factors = Factors(
        scale,
        folded=not half,
        inverse_count=inverse_count,
        bound=_gradient_bound(weights, upstream, labels) if half else None,
        largest=a.t2 / a.temperature + labels,
    )
    found = _found_before(a, scale, factors, weights, lse, labels)
    scale_gradients = common.empty_float32(scale, n) if any(wanted) else None
    teacher_scales = common.as_float32(a.teacher_scales)

    def run(plan: schedule.Plan) -> list[Tensor]:
        blocks = Blocks(models, plan)
        gradients = OperandGradients(models[0], wanted, dtype, factors, blocks.once)
        if lse is None:
            _first_pass(a, blocks, scale, teacher_scales, weights, factors, found)
        launch_gradient = PairKernel(
            pair_kl_gradient,
            blocks,
            factors,
            any(wanted[:2]),
            teacher_y_ptrs=blocks.of_models[1:],
            inputs=_gradient_inputs(scale, teacher_scales, upstream, found),
            scale_gradients_ptr=scale_gradients,
            classes=n,
            numbers=(1.0 / a.temperature, a.t2 / a.temperature),
        )
        if any(wanted):
            blocks.visit([launch_gradient], gradients, stored=lse is None and all(blocks.once))
        return gradients.finished()

    kind = {"softmax": False, "columns_too": lse is None}
    problem = schedule.Problem.of(models, any(wanted), **kind)
    operand_gradients = autotune.run_plan("pair_kl", problem, models, run)
    return found, RowResults(found.loss, (scale_gradients,), operand_gradients), factors


def _found_before(
    a: _Arguments,
    scale: Tensor,
    factors: Factors,
    weights: Tensor | None,
    lse: Tensor | None,
    labels: bool,
) -> _Found:
    """Memory for what the first pass finds; what is known, where there is none."""
    n, k = a.n, len(a.teacher_image_features)
    loss = common.empty_float32(scale, n)
    if lse is not None:
        assert weights is not None
        return _Found(loss, weights, weights, weights, lse)
    kl, used, entropy = (common.empty_float32(scale, 2, n, k) for _ in range(3))
    lse = common.empty_float32(scale, 2, 1 + k, n, 2)
    of_labels = LabelSums(a.models[0], scale, factors) if labels else None
    return _Found(loss, kl, used, entropy, lse, of_labels)


def _gradient_inputs(
    scale: Tensor, teacher_scales: Tensor, upstream: Tensor | None, found: _Found
) -> tuple[Tensor | None, ...]:
    labels = (None, None) if found.labels is None else found.labels.lse
    return (scale, teacher_scales, upstream, found.weights, found.lse, *labels)


def _first_pass(
    a: _Arguments,
    blocks: Blocks,
    scale: Tensor,
    teacher_scales: Tensor,
    weights: Tensor | None,
    factors: Factors,
    found: _Found,
) -> None:
    """Write all of `found`."""
    n, models = a.n, len(blocks.models)
    states = common.empty_float32(scale, 2, models, 5, n)
    sides = common.empty_float32(scale, 2, n)
    own = torch.arange(n, device=scale.device) if weights is None and a.gate_label != 0 else None
    both = [
        row_softmax.Rows(
            row_softmax.TEACHER_KL,
            blocks.models,
            scale,
            factors,
            teacher_scales,
            None if weights is None else weights[side],
            own,
            outputs=(sides[side], found.kl[side], found.weights[side], found.entropy[side], None),
            temperature=a.temperature,
            entropy_factor=a.gate_entropy / a.gate_temperature,
            label_factor=a.gate_label / a.gate_temperature,
            t2=a.t2,
            target_source=row_softmax.NO_TARGET if own is None else row_softmax.TARGET,
        )
        for side in range(2)
    ]
    kernels = [
        softmax_loss.StoredRows(both[0], blocks, states[0]),
        softmax_loss.StoredRows(both[1], blocks, states[1], swap=True),
        *(() if found.labels is None else found.labels.kernels(blocks)),
    ]
    blocks.visit(kernels)
    launch(
        pair_kl_rows,
        (ceil_div(n, 128),),
        scale.device,
        4,
        1,
        state_ptr=states,
        scale_ptr=scale,
        teacher_scales_ptr=teacher_scales,
        sides_ptr=sides,
        loss_ptr=found.loss,
        lse_ptr=found.lse,
        inverse_temperature=1.0 / a.temperature,
        n=n,
        MODELS=models,
        ROWS=128,
    )
    if found.labels is not None:
        found.labels.finish()


def _gradient_bound(weights: Tensor | None, upstream: Tensor | None, labels: bool) -> Tensor | None:
    """A bound of |G|, beside `Factors.largest`, where it is not 1."""
    bound = None if weights is None else weights.abs().sum(2).amax()
    if bound is not None and labels:
        bound = bound.clamp(min=1)
    if upstream is None:
        return bound
    largest = upstream.abs().amax()
    return largest if bound is None else bound * largest


def pair_kl(*arguments: Any) -> tuple[Tensor, ...]:
    """The loss of each pair [N]; kl, weights, entropy [2, N, K]; lse [2, 1 + K, N, 2]; float32."""
    a = _Arguments(*arguments)
    if a.n == 0:
        return common.empty_float32(a.scale, 0), *_details_of_no_pairs(a), _lse_of_no_pairs(a)
    found, _, _ = _compute(a, (False,) * 3, torch.float32)
    return found.loss, found.kl, found.weights, found.entropy, found.lse


def pair_kl_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of image features, text features and scale for one upstream per pair."""
    *models_and_weights, lse, temperature, scale_by_t2, wanted = arguments
    a = _Arguments._make((*models_and_weights, temperature, 1.0, 0.0, 0.0, scale_by_t2))
    student, dtype = (a.image_features, a.text_features), a.image_features.dtype
    if a.n == 0:
        return row_results.backward_of_no_rows(*student, wanted, dtype)
    known = common.as_float32(lse)
    _, results, _ = _compute(a, wanted, dtype, common.as_float32(grad), known)
    return row_results.backward_outputs(results, wanted)


def pair_kl_reduced(*arguments: Any) -> tuple[Tensor, ...]:
    """The sum or mean over pairs; kl, weights, entropy [2, N, K]; the gradients in float32."""
    *forward, mean, wanted = arguments
    a = _Arguments(*forward)
    if a.n == 0:
        return _reduced_of_no_pairs(a, mean, wanted)
    inverse_count = 1.0 / a.n if mean else 1.0
    found, results, factors = _compute(a, wanted, torch.float32, inverse_count=inverse_count)
    details = found.kl, found.weights, found.entropy
    return row_results.reduced_outputs(results._replace(details=details), wanted, factors)


def pair_kl_with_labels(*arguments: Any) -> tuple[Tensor, ...]:
    """The totals of contrastive and of pair_kl [2]; the rest as above, of the sum of both."""
    *forward, mean, wanted = arguments
    a = _Arguments(*forward)
    if a.n == 0:
        total, *rest = _reduced_of_no_pairs(a, mean, wanted)
        return torch.stack([total, total]), *rest
    inverse_count = 1.0 / a.n if mean else 1.0
    found, results, factors = _compute(
        a, wanted, torch.float32, inverse_count=inverse_count, labels=True
    )
    assert found.labels is not None
    details = found.kl, found.weights, found.entropy
    total, *rest = row_results.reduced_outputs(results._replace(details=details), wanted, factors)
    (of_labels,) = sums.totals([found.labels.loss], factors)
    return torch.stack([of_labels, total]), *rest


def _details_of_no_pairs(a: _Arguments) -> tuple[Tensor, ...]:
    k = len(a.teacher_image_features)
    return tuple(common.empty_float32(a.scale, 2, 0, k) for _ in range(3))


def _lse_of_no_pairs(a: _Arguments) -> Tensor:
    return common.empty_float32(a.scale, 2, 1 + len(a.teacher_image_features), 0, 2)


def _reduced_of_no_pairs(a: _Arguments, mean: bool, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    student = a.image_features, a.text_features
    return row_results.reduced_of_no_rows(*student, mean, wanted, _details_of_no_pairs(a))
