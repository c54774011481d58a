# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""contrastive: loss_i = 1/2 (log sum_j exp u_ij + log sum_j exp u_ji) - u_ii, u = scale X W^T.

    dL/du_ij = 1/2 (g_i exp(u_ij - row_lse_i) + g_j exp(u_ij - column_lse_j)) - g_i [i = j]

The N rows of X match the N rows of W. For each block of logits (`chunks`), `softmax_loss` is
launched for the statistics of its rows and for those of its columns, with the diagonal as the
target; both are merged over the blocks. `contrastive_rows` makes of them the loss and both
log-sum-exps. `contrastive_gradient` reads the logits of a block once more, and writes G over them.
A column is known when its last row is: where the logits are more than one block, they are made
again for G, and that is one product more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from . import autotune, common, row_results, row_softmax, schedule, softmax_loss
from .chunks import BlockKernel, Blocks, OperandGradients, PairKernel
from .common import Model, ceil_div
from .launch import launch
from .pair_tiles import add_to_rows, log_of_columns, log_of_rows, store_gradient
from .products import absolute_scale, jit_kernel
from .row_results import RowResults
from .sums import Factors, logit_factor


@jit_kernel
def contrastive_rows(
    state_ptr,  # [5, N] statistics of rows, see `row_softmax`
    column_state_ptr,  # [5, N] of columns
    scale_ptr,  # 0-d
    loss_ptr,  # [N]
    row_lse_ptr,  # [N, 2], the log-sum-exp as the sum of two numbers
    column_lse_ptr,  # [N, 2]
    n,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    _, c, _ = absolute_scale(scale_ptr, 1.0)
    at = state_ptr + rows
    top = tl.load(at, mask=inside, other=0.0)
    log_sum = tl.log(tl.load(at + n, mask=inside, other=1.0))
    # The largest logit is subtracted before the diagonal is: large logits do not cancel.
    loss = log_sum - c * (tl.load(at + 4 * n, mask=inside, other=0.0) - top)
    tl.store(row_lse_ptr + 2 * rows, c * top, mask=inside)
    tl.store(row_lse_ptr + 2 * rows + 1, log_sum, mask=inside)
    at = column_state_ptr + rows
    top = tl.load(at, mask=inside, other=0.0)
    log_sum = tl.log(tl.load(at + n, mask=inside, other=1.0))
    loss += log_sum - c * (tl.load(at + 4 * n, mask=inside, other=0.0) - top)
    tl.store(column_lse_ptr + 2 * rows, c * top, mask=inside)
    tl.store(column_lse_ptr + 2 * rows + 1, log_sum, mask=inside)
    tl.store(loss_ptr + rows, 0.5 * loss, mask=inside)


@jit_kernel
def contrastive_gradient(
    y_ptr,  # [n', S] float32
    row_stride,
    g_ptr,  # [n', *] in the dtype of X, or None
    g_stride,
    upstream_ptr,  # [N], or None for 1
    row_lse_ptr,  # [N, 2], see `contrastive_rows`
    column_lse_ptr,  # [N, 2]
    scale_gradients_ptr,  # [N] contributions to dL/dscale
    factors,  # see `Factors.values`
    first,  # the first row
    offset,  # the first column
    n,  # rows of the block
    p,  # columns of the block
    loaded,  # columns that may be read
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    FOLDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    scale = tl.load(factors[0]).to(tl.float32)
    factor = logit_factor(factors, FOLDED)
    for i in tl.range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0), disable_licm=True):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = rows < n
        samples = first + rows.to(tl.int64)
        upstream = tl.full([ROWS], 1.0, tl.float32)
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr + samples, mask=inside, other=0.0)
        moment = tl.zeros([ROWS, BLOCK_P], tl.float32)
        row_ptrs = y_ptr + rows.to(tl.int64)[:, None] * row_stride
        for start in tl.range(0, p, BLOCK_P, num_stages=1):
            columns = start + tl.arange(0, BLOCK_P)
            within = columns < p
            if EVEN:
                y = tl.load(row_ptrs + columns[None, :])
            else:
                y = tl.load(
                    row_ptrs + columns[None, :], mask=(columns < loaded)[None, :], other=0.0
                )
            u = scale * y
            classes = offset + columns
            of_columns = tl.full([BLOCK_P], 1.0, tl.float32)
            if upstream_ptr is not None:
                of_columns = tl.load(upstream_ptr + classes, mask=within, other=0.0)
            of_row = tl.exp2(log_of_rows(u, row_lse_ptr, samples, inside))
            of_column = tl.exp2(log_of_columns(u, column_lse_ptr, classes, within))
            g = (0.5 * upstream)[:, None] * of_row + (0.5 * of_columns)[None, :] * of_column
            g -= tl.where(samples[:, None] == classes[None, :], upstream[:, None], 0.0)
            of_scale = g * y
            if MASKED:
                g = tl.where(within[None, :], g, 0.0)
                of_scale = tl.where(within[None, :], of_scale, 0.0)
            moment += of_scale
            if g_ptr is not None:
                store_gradient(g_ptr, g_stride, rows, columns, factor * g, loaded, EVEN)
        before = rows < tl.where(offset > 0, n, 0)
        add_to_rows(scale_gradients_ptr, samples, inside, before, tl.sum(moment, 1))


def _compute(
    model: Model,
    logit_scale: Tensor,
    wanted: Sequence[bool],
    dtype: torch.dtype,
    upstream: Tensor | None = None,
    known: Sequence[Tensor] | None = None,  # row_lse and column_lse, where they are known
    inverse_count: float = 1.0,
) -> tuple[RowResults, Factors]:
    """Losses of at least one row and both log-sum-exps; the wanted gradients in `dtype`."""
    n = model.features.shape[0]
    scale, half = common.as_float32(logit_scale), model.features.dtype == torch.float16
    bound = upstream.abs().amax() if half and upstream is not None else None
    factors = Factors(scale, not half, inverse_count=inverse_count, bound=bound)
    sums = LabelSums(model, scale, factors, known)
    scale_gradients = common.empty_float32(scale, n) if any(wanted) else None

    def run(plan: schedule.Plan) -> list[Tensor]:
        blocks = Blocks([model], plan)
        found = OperandGradients(model, wanted, dtype, factors, blocks.once)
        launch_gradient = PairKernel(
            contrastive_gradient,
            blocks,
            factors,
            any(wanted[:2]),
            upstream_ptr=upstream,
            row_lse_ptr=sums.lse[0],
            column_lse_ptr=sums.lse[1],
            scale_gradients_ptr=scale_gradients,
        )
        if known is None:
            blocks.visit(sums.kernels(blocks))
            sums.finish()
        if any(wanted):
            blocks.visit([launch_gradient], found, stored=known is None and all(blocks.once))
        return found.finished()

    problem = schedule.Problem.of([model], any(wanted), softmax=False, columns_too=known is None)
    operand_gradients = autotune.run_plan("contrastive", problem, [model], run)
    return RowResults(sums.loss, (scale_gradients,), operand_gradients, sums.lse), factors


class LabelSums:
    """The loss and both log-sum-exps, from the logits of one block after the other.

    Args:
        known: both log-sum-exps [N, 2], where an earlier pass found them; there is no loss then.
    """

    def __init__(
        self, model: Model, scale: Tensor, factors: Factors, known: Sequence[Tensor] | None = None
    ) -> None:
        n = model.features.shape[0]
        self.loss = common.empty_float32(scale, n)
        if known is not None:
            self.lse = tuple(known)
            return
        self.lse = common.empty_float32(scale, n, 2), common.empty_float32(scale, n, 2)
        self._states = common.empty_float32(scale, 2, 1, 5, n)
        self._rows = row_softmax.Rows(
            row_softmax.NO_LOSS, [model], scale, factors, target_source=row_softmax.DIAGONAL
        )

    def kernels(self, blocks: Blocks) -> tuple[BlockKernel, BlockKernel]:
        """What takes the rows and the columns of a block, the logits of the student lying first."""
        return (
            softmax_loss.StoredRows(self._rows, blocks, self._states[0]),
            softmax_loss.StoredRows(self._rows, blocks, self._states[1], swap=True),
        )

    def finish(self) -> None:
        """Write the loss and the log-sum-exps."""
        n, scale = self.loss.shape[0], self._rows.scale
        launch(
            contrastive_rows,
            (ceil_div(n, 128),),
            scale.device,
            4,
            1,
            state_ptr=self._states[0],
            column_state_ptr=self._states[1],
            scale_ptr=scale,
            loss_ptr=self.loss,
            row_lse_ptr=self.lse[0],
            column_lse_ptr=self.lse[1],
            n=n,
            ROWS=128,
        )


def contrastive(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor
) -> tuple[Tensor, ...]:
    """loss [N]; row_lse, column_lse [N, 2]; all float32."""
    if image_features.shape[0] == 0:
        shapes = (0,), (0, 2), (0, 2)
        return tuple(common.empty_float32(image_features, *shape) for shape in shapes)
    model = Model.of(image_features, text_features)
    results, _ = _compute(model, logit_scale, [False] * 3, torch.float32)
    return results.loss, *results.details


def contrastive_backward(
    grad: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of image_features, text_features, logit_scale for one upstream per row."""
    dtype = image_features.dtype
    if image_features.shape[0] == 0:
        return row_results.backward_of_no_rows(image_features, text_features, wanted, dtype)
    model = Model.of(image_features, text_features)
    known = common.as_float32(row_lse), common.as_float32(column_lse)
    results, _ = _compute(model, logit_scale, wanted, dtype, common.as_float32(grad), known)
    return row_results.backward_outputs(results, wanted)


def contrastive_reduced(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    mean: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The sum or mean over pairs; the gradients of the three tensors in float32."""
    n = image_features.shape[0]
    if n == 0:
        return row_results.reduced_of_no_rows(image_features, text_features, mean, wanted)
    model = Model.of(image_features, text_features)
    results, factors = _compute(
        model, logit_scale, wanted, torch.float32, inverse_count=1.0 / n if mean else 1.0
    )
    return row_results.reduced_outputs(results._replace(details=()), wanted, factors)
