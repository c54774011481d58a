# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Losses of N pairs, over the rows and over the columns of u = scale X W^T: of labels, of teachers.

    labels    1/2 (log sum_j exp u_ij + log sum_j exp u_ji) - u_ii, whose G_ij is
              1/2 (g_i exp(u_ij - row_lse_i) + g_j exp(u_ij - column_lse_j)) - g_i [i = j]
    teachers  1/2 (sum_k w_ik KL_ik of row i + the same of column i), w of rows and of columns
              apart, whose G_ij is
              t / 2T (g_i (a_i q_ij - sum_k w_ik p_ijk) + g_j (b_j q'_ij - sum_k w'_jk p'_ijk))

g are upstream gradients; q, p the softmax over rows of student and teacher k at temperature T, q',
p' those over columns; a and b sums of weights. KL, gates and t are those of `teacher_kl`.

For each block of logits (`chunks`), `softmax_loss` is launched for its rows and for its columns, of
each loss, with the own pair as the target. `pair_rows` makes of that the loss and the log-sum-exps.
`pair_gradient` reads the logits of a block once more, and writes G over the student's. A column is
known when its last row is: where the logits are more than one block, they are made again for G, and
that is one product more for each model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, results, schedule
from .chunks import BlockKernel, Blocks, OperandGradients, PairKernel
from .common import Model, ceil_div
from .launch import launch
from .products import absolute_scale, add_to_rows, jit_kernel, load_logits, store_gradient
from .row_softmax import Inputs, Numbers, Outputs, Rows
from .softmax_loss import StoredRows
from .sums import Factors, logit_factor

if TYPE_CHECKING:
    from mulki.ops.operators import Request


class LabelTerms(NamedTuple):
    """What G of the labels' loss is made of; nothing where there is none."""

    lse: Tensor | None = None  # [2, N, 2] of rows and of columns, each the sum of two numbers
    upstream: Tensor | None = None  # [N], or None for 1


class TeacherTerms(NamedTuple):
    """What G of the teachers' loss is made of; nothing where there is none."""

    lse: Tensor | None = None  # [2, 1 + K, N, 2]
    upstream: Tensor | None = None  # [N], or None for 1
    y: tuple[Tensor, ...] | None = None  # K of [n', S], the logits of a block
    scales: Tensor | None = None  # [K]
    weights: Tensor | None = None  # [2, N, K]
    inverse_temperature: float = 1.0
    t2: float = 1.0


@jit_kernel
def pair_rows(
    state_ptr,  # [2, MODELS, 5, N] statistics of rows and of columns, see `row_statistics`
    scale_ptr,  # 0-d
    teacher_scales_ptr,  # [K], or None
    sides_ptr,  # [2, N] losses of rows and of columns; None for those of labels
    loss_ptr,  # [N]
    lse_ptr,  # [2, MODELS, N, 2], the log-sum-exp as the sum of two numbers
    inverse_temperature,
    n,
    MODELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    total = tl.cast(n, tl.int64)  # whose statistics may be more than 2^31
    loss = tl.zeros([ROWS], tl.float32)
    for m in tl.static_range(MODELS):
        of_model = scale_ptr if m == 0 else teacher_scales_ptr + (m - 1)
        _, c, _ = absolute_scale(of_model, inverse_temperature)
        for side in tl.static_range(2):
            at = state_ptr + (side * MODELS + m) * 5 * total + rows
            top = tl.load(at, mask=inside, other=0.0)
            log_sum = tl.log(tl.load(at + total, mask=inside, other=1.0))
            to = lse_ptr + ((side * MODELS + m) * total + rows) * 2
            tl.store(to, c * top, mask=inside)
            tl.store(to + 1, log_sum, mask=inside)
            if sides_ptr is None:
                # The largest logit is subtracted before the own one is: large ones do not cancel.
                loss += log_sum - c * (tl.load(at + 4 * total, mask=inside, other=0.0) - top)
    if sides_ptr is not None:
        loss = tl.load(sides_ptr + rows, mask=inside, other=0.0)
        loss += tl.load(sides_ptr + total + rows, mask=inside, other=0.0)
    tl.store(loss_ptr + rows, 0.5 * loss, mask=inside)


@triton.jit
def _log_softmax(u, lse_ptr, at, inside):
    """log2 of the softmax of u; [ROWS] or [BLOCK_P] places of log-sum-exps, or either with an axis.

    The two numbers are subtracted one after the other.
    """
    high = tl.load(lse_ptr + 2 * at, mask=inside, other=0.0)
    low = tl.load(lse_ptr + 2 * at + 1, mask=inside, other=0.0)
    return (u - high - low) * 1.4426950408889634


@triton.jit
def _half_upstream(upstream_ptr, at, inside):
    half = tl.full(at.shape, 0.5, tl.float32)
    if upstream_ptr is not None:
        half *= tl.load(upstream_ptr + at, mask=inside, other=0.0)
    return half


@triton.jit
def _of_labels(terms, u, samples, pairs, inside, within, total):
    """A tile of G; `samples` are its rows [ROWS, 1] and `pairs` its columns [1, BLOCK_P]."""
    of_rows = _half_upstream(terms.upstream, samples, inside)
    of_columns = _half_upstream(terms.upstream, pairs, within)
    g = of_rows * tl.exp2(_log_softmax(u, terms.lse, samples, inside))
    g += of_columns * tl.exp2(_log_softmax(u, terms.lse + 2 * total, pairs, within))
    return g - tl.where(samples == pairs, 2.0 * of_rows, 0.0)


@triton.jit
def _of_teachers(
    terms, scale, y, places, columns, loaded, samples, pairs, inside, within, total,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The same of the teachers' loss; their logits lie at `places`."""
    K: tl.constexpr = len(terms.y)
    of_rows = _half_upstream(terms.upstream, samples, inside)
    of_columns = _half_upstream(terms.upstream, pairs, within)
    row_lse, column_lse = terms.lse, terms.lse + 2 * (K + 1) * total
    row_weight = tl.zeros(samples.shape, tl.float32)
    column_weight = tl.zeros(pairs.shape, tl.float32)
    # Apart, for a student that equals its teacher: each of the two is zero then.
    g_rows = tl.zeros(y.shape, tl.float32)
    g_columns = tl.zeros(y.shape, tl.float32)
    for k in tl.static_range(K):
        v = load_logits(terms.y[k] + places, columns, 1, loaded, EVEN)
        v *= tl.load(terms.scales + k) * terms.inverse_temperature
        of_model = 2 * (k + 1) * total
        weight = tl.load(terms.weights + samples * K + k, mask=inside, other=0.0)
        row_weight += weight
        p = tl.exp2(_log_softmax(v, row_lse + of_model, samples, inside))
        g_rows -= (of_rows * weight) * p
        weight = tl.load(terms.weights + (total + pairs) * K + k, mask=within, other=0.0)
        column_weight += weight
        p = tl.exp2(_log_softmax(v, column_lse + of_model, pairs, within))
        g_columns -= (of_columns * weight) * p
    u = (scale * terms.inverse_temperature) * y
    g_rows += (of_rows * row_weight) * tl.exp2(_log_softmax(u, row_lse, samples, inside))
    g_columns += (of_columns * column_weight) * tl.exp2(_log_softmax(u, column_lse, pairs, within))
    return (terms.t2 * terms.inverse_temperature) * (g_rows + g_columns)


@jit_kernel
def pair_gradient(
    y_ptr,  # [n', S] float32, of the student
    row_stride,
    g_ptr,  # [n', *] in the dtype of X, or None
    g_stride,
    labels,  # see `LabelTerms`
    teachers,  # see `TeacherTerms`
    factors,  # see `Factors`
    scale_gradients_ptr,  # [N] contributions to dL/dscale
    first_row,
    first_column,
    n,  # rows of the block
    p,  # columns of the block
    loaded,  # columns that may be read
    classes,  # N
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    total = tl.cast(classes, tl.int64)
    scale = tl.load(factors.scale).to(tl.float32)
    factor = logit_factor(factors)
    for i in tl.range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0), disable_licm=True):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        samples = first_row + rows.to(tl.int64)
        places = rows.to(tl.int64) * row_stride
        moment = tl.zeros([ROWS, BLOCK_P], tl.float32)
        for start in tl.range(0, p, BLOCK_P, num_stages=1):
            columns = start + tl.arange(0, BLOCK_P)
            within = (columns < p)[None, :]
            pairs = first_column + columns.to(tl.int64)
            y = load_logits(y_ptr + places, columns, 1, loaded, EVEN)
            g = tl.zeros([ROWS, BLOCK_P], tl.float32)
            if teachers.lse is not None:
                g += _of_teachers(
                    teachers, scale, y, places, columns, loaded, samples[:, None], pairs[None, :],
                    inside[:, None], within, total, EVEN,
                )  # fmt: skip
            if labels.lse is not None:
                g += _of_labels(
                    labels, scale * y, samples[:, None], pairs[None, :], inside[:, None], within,
                    total,
                )  # fmt: skip
            of_scale = g * y
            if MASKED:
                g = tl.where(within, g, 0.0)
                of_scale = tl.where(within, of_scale, 0.0)
            moment += of_scale
            if g_ptr is not None:
                tl.debug_barrier()  # in half precision it lies over logits that others read
                to = g_ptr + rows.to(tl.int64) * g_stride
                store_gradient(to, columns, factor * g, loaded, EVEN)
        before = rows < tl.where(first_column > 0, n, 0)
        add_to_rows(scale_gradients_ptr, samples, inside, before, tl.sum(moment, 1))


class Teachers(NamedTuple):
    """The options of the teachers' loss, and what it writes for the caller."""

    scales: Tensor  # [K] float32
    numbers: Numbers
    given_weights: Tensor | None  # [2, N, K] float32, or None for those of the gate
    labelled: bool  # whether the gate looks at the own pair
    details: Sequence[Tensor]  # kl, weights, entropy [2, N, K], which are written


class _Sides:
    """A loss over rows and over columns, from the logits of one block after the other.

    Args:
        both: the loss of rows, and that of columns.
        loss: [N], which is written.
        sides: [2, N], which `both` write.
    """

    def __init__(self, both: Sequence[Rows], loss: Tensor, sides: Tensor | None = None) -> None:
        self._both, self._loss, self._sides = both, loss, sides
        models, n = len(both[0].models), loss.shape[0]
        self.lse = common.empty_float32(loss, 2, models, n, 2)
        self._states = common.empty_float32(loss, 2, models, 5, n)

    def kernels(self, blocks: Blocks) -> list[BlockKernel]:
        """What takes the rows and the columns of a block, the logits of the student lying first."""
        rows, columns = self._both
        return [
            StoredRows(rows, blocks, self._states[0]),
            StoredRows(columns, blocks, self._states[1], swap=True),
        ]

    def finish(self) -> None:
        """Write the loss and the log-sum-exps."""
        n, rows = self._loss.shape[0], self._both[0]
        launch(
            pair_rows,
            (ceil_div(n, 128),),
            4,
            1,
            state_ptr=self._states,
            scale_ptr=rows.inputs.scale,
            teacher_scales_ptr=rows.inputs.teacher_scales,
            sides_ptr=self._sides,
            loss_ptr=self._loss,
            lse_ptr=self.lse,
            inverse_temperature=rows.numbers.inverse_temperature,
            n=n,
            MODELS=len(rows.models),
            ROWS=128,
        )


def _sides_of(
    teachers: Teachers, models: Sequence[Model], factors: Factors, loss: Tensor
) -> _Sides:
    n, sides = loss.shape[0], common.empty_float32(loss, 2, loss.shape[0])
    given, both = teachers.given_weights, []
    labelled = given is None and teachers.labelled
    own = torch.arange(n, device=loss.device) if labelled else None
    for side in range(2):
        weights = None if given is None else given[side]
        inputs = Inputs(factors.scale, teachers.scales, target=own, weights=weights)
        outputs = Outputs(sides[side], *(t[side] for t in teachers.details))
        both.append(Rows("teacher_kl", models, factors, inputs, outputs, teachers.numbers))
    return _Sides(both, loss, sides)


def compute(
    models: Sequence[Model],  # the student, then the teachers
    scale: Tensor,
    request: Request,
    leaves: Sequence[Tensor],
    labels: bool,
    teachers: Teachers | None = None,
) -> tuple[Tensor, ...]:
    """The results of one of the losses or of both, of at least one pair."""
    n, scale, wanted = len(leaves[0]), common.as_float32(scale), request.wanted
    upstream = results.upstream(request, n)
    largest, weights = float(labels), None
    if teachers is not None:
        weights = teachers.given_weights
        largest += teachers.numbers.t2 * teachers.numbers.inverse_temperature
    factors = Factors.of(
        leaves[0],
        scale,
        results.inverse_count(request, n),
        largest=largest,
        upstream=upstream,
        weights=weights,
        least=float(labels),
    )
    two = labels and teachers is not None
    losses = common.empty_float32(scale, *((2, n) if two else (n,)))
    of_labels, of_teachers = (losses[0], losses[-1]) if two else (losses, losses)
    upstreams = upstream if two and upstream is not None else (upstream, upstream)
    parts, label_terms, teacher_terms = [], LabelTerms(), TeacherTerms()
    if teachers is not None:
        parts.append(_sides_of(teachers, models, factors, of_teachers))
        teacher_terms = TeacherTerms(
            parts[0].lse,
            upstreams[1],
            scales=teachers.scales,
            weights=teachers.details[1],
            inverse_temperature=teachers.numbers.inverse_temperature,
            t2=teachers.numbers.t2,
        )
    if labels:
        rows = Rows("diagonal", models[:1], factors, Inputs(scale))
        parts.append(_Sides([rows, rows], of_labels))
        label_terms = LabelTerms(parts[-1].lse, upstreams[0])
    scale_gradients = common.empty_float32(scale, n) if any(wanted) else None

    problem = schedule.Problem.of(models, any(wanted), softmax=False, columns_too=True)
    blocks = Blocks(models, schedule.plan(problem))
    dtype = results.dtype(request, leaves[0])
    found = OperandGradients(models[0], wanted, dtype, factors, blocks.once)
    blocks.visit([kernel for part in parts for kernel in part.kernels(blocks)])
    for part in parts:
        part.finish()
    if any(wanted):
        gradient = PairKernel(
            pair_gradient,
            blocks,
            any(wanted[:2]),
            labels=label_terms,
            teachers=teacher_terms._replace(y=tuple(blocks.of_models[1:]) or None),
            factors=factors,
            scale_gradients_ptr=scale_gradients,
            classes=n,
        )
        blocks.visit([gradient], found, stored=all(blocks.once))
    details = () if teachers is None else teachers.details
    of_scalars = (scale_gradients,)
    return results.returned(request, factors, leaves, losses, details, found.finished(), of_scalars)
