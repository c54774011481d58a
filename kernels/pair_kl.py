# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""pair_kl, and with its labels contrastive: losses of N pairs over rows and columns of the logits.

y_m = X_m W_m^T [N, N] of every model m (0 is the student, K teachers follow), u = scale y:

    teachers  d_i = 1/2 (sum_k w_ik KL_ik of row i + the same of column i), KL and w as in
              `teacher_kl` at temperature T, the own pair being the label; w of rows and columns
              apart
    labels    l_i = 1/2 (log sum_j exp u_ij + log sum_j exp u_ji) - u_ii, the loss of `contrastive`
    loss_i    weight d_i + label_weight l_i

with q, p the softmax over rows, q', p' over columns, and g the upstream gradients

    G_ij = weight t / 2T (g_i sum_k w_ik (q_ij - p_ijk) + g_j sum_k w'_jk (q'_ij - p'_ijk))
           + label_weight (1/2 (g_i q_ij + g_j q'_ij) - g_i [i = j])      (q of labels at T = 1)

A column is known when its last row is. So there are several kernels:

    pair_statistics  of a tile, the statistics (`teacher_kl`) of its rows and of its columns
    merge_parts      of the parts of a row or a column, one after the other
    pair_losses      of each pair, from its row and its column
    pair_gradient    G, from the logits of a tile and what is known of its rows and columns

Tiles of logits are made by tl.dot in the first and the last, or, where D is large and all fit the
memory of a block, stored once by the library. Where the parts would not fit it, rows are taken in
chunks, and columns are merged with those before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mulki.ops import reference
from mulki.ops.operators import OPERATORS, Request
from mulki.ops.pair_kl import PairKl

from . import teacher_kl
from .gradients import MEMORY, Gradients, multiply
from .teacher_kl import Inputs, Numbers, Outputs, Statistics
from .tiles import Operands, ceil_div, jit_kernel, logit_tiles, new_float32, tile_of

ROWS = 64  # of a program of `merge_parts` and `pair_losses`
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}  # of their launches

# LOSSES: how many models each loss has, the teachers' 1 + K, the labels' 1. Numbers of rows lie as
# [fields, N]: of one loss after the other tops, sums, own and other.


@triton.jit
def store_all(ptr, stride, at, inside, found):
    """Write the statistics of rows, of one loss or of two."""
    for i in tl.static_range(len(found)):
        numbers = found[i].tops + found[i].sums + found[i].own + found[i].other
        for j in tl.static_range(len(numbers)):
            tl.store(ptr + j * stride + at, numbers[j], mask=inside)
        ptr += len(numbers) * stride


@triton.jit
def load_numbers(ptr, stride, at, inside, COUNT: tl.constexpr):
    numbers = ()
    for i in tl.static_range(COUNT):
        numbers = numbers + (tl.load(ptr + i * stride + at, mask=inside, other=1.0),)
    return numbers


@triton.jit
def load_statistics(ptr, stride, at, inside, M: tl.constexpr):
    tops = load_numbers(ptr, stride, at, inside, M)
    sums = load_numbers(ptr + M * stride, stride, at, inside, M)
    own = load_numbers(ptr + 2 * M * stride, stride, at, inside, M - 1)
    other = load_numbers(ptr + (3 * M - 1) * stride, stride, at, inside, M - 1)
    nothing = teacher_kl.no_statistics(tl.zeros_like(tops[0]), M)
    return Statistics(tops, sums, own, other, nothing.targets, nothing.totals)


@triton.jit
def load_all(ptr, stride, at, inside, LOSSES: tl.constexpr):
    """What `store_all` wrote, of no target."""
    found = ()
    for i in tl.static_range(len(LOSSES)):
        found = found + (load_statistics(ptr, stride, at, inside, LOSSES[i]),)
        ptr += (4 * LOSSES[i] - 2) * stride
    return found


@triton.jit
def loss_scales(scales, numbers, LOSSES: tl.constexpr):
    """c of the models of each loss: that of labels is at T = 1."""
    found = ()
    for i in tl.static_range(len(LOSSES)):
        if LOSSES[i] == 1:
            found = found + (teacher_kl.model_scales((scales[0],), 1.0),)
        else:
            found = found + (teacher_kl.model_scales(scales, numbers.inverse_temperature),)
    return found


@jit_kernel
def pair_statistics(
    operands,  # see `Operands`
    logits,  # [n, N] float32 of every model, without their scales; None to multiply
    own_ptr,  # [models, N] y_ii
    row_parts_ptr,  # [column blocks, fields, n]
    column_parts_ptr,  # [row blocks, fields, N]
    numbers,
    first_row, n, total,  # sample of the first row, rows of this launch, N
    FIELDS: tl.constexpr,
    LOSSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(total, TILE.columns)
    i, j = tl.program_id(0) // parts, tl.program_id(0) % parts
    rows = i * TILE.rows + tl.arange(0, TILE.rows)
    columns = j * TILE.columns + tl.arange(0, TILE.columns)
    samples, pairs = first_row + rows.to(tl.int64), columns.to(tl.int64)
    inside, within = rows < n, columns < total
    wide = tl.cast(total, tl.int64)
    ys = logit_tiles(operands, logits, rows, samples, columns, n, total, total, TILE)
    turned = ()
    is_own = samples[:, None] == pairs[None, :]
    for m in tl.static_range(len(ys)):
        turned = turned + (tl.trans(ys[m]),)
        y, here = tl.sum(tl.where(is_own, ys[m], 0.0), 1), inside & (samples // TILE.columns == j)
        tl.store(own_ptr + m * wide + samples, y, mask=here)
    cs = loss_scales(operands.scales, numbers, LOSSES)
    active, active_turned = inside[:, None] & within[None, :], within[:, None] & inside[None, :]
    of_rows, of_columns = (), ()
    for k in tl.static_range(len(LOSSES)):
        found = teacher_kl.statistics_of(ys, cs[k], active, active, False, False)
        turned_found = teacher_kl.statistics_of(turned, cs[k], active_turned, active, False, False)
        of_rows, of_columns = of_rows + (found,), of_columns + (turned_found,)
    store_all(row_parts_ptr + j * tl.cast(n, tl.int64) * FIELDS, n, rows, inside, of_rows)
    store_all(column_parts_ptr + i * wide * FIELDS, wide, columns, within, of_columns)


@jit_kernel
def merge_parts(
    parts_ptr,  # [parts, fields, n]
    before_ptr,  # [fields, N], of the chunks before; or None
    out_ptr,  # [fields, N]
    first_row,  # where the n rows begin in `out_ptr`
    n,
    total,  # N
    parts,
    FIELDS: tl.constexpr,
    LOSSES: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    at = first_row + rows.to(tl.int64)
    size, wide = tl.cast(n, tl.int64), tl.cast(total, tl.int64)
    start = 0
    if before_ptr is None:
        found = load_all(parts_ptr, size, rows, inside, LOSSES)
        start = 1
    else:
        found = load_all(before_ptr, wide, at, inside, LOSSES)
    for i in range(start, parts):
        part = load_all(parts_ptr + i * size * FIELDS, size, rows, inside, LOSSES)
        both = ()
        for k in tl.static_range(len(LOSSES)):
            both = both + (teacher_kl.merged(found[k], part[k]),)
        found = both
    store_all(out_ptr, wide, at, inside, found)


@jit_kernel
def pair_losses(
    scales,  # 0-d of every model
    state_ptr,  # [2, fields, N], of rows and of columns
    own_ptr,  # [models, N]
    inputs,  # see `Inputs`; weights [2, N, K]
    outputs,  # see `Outputs`; kl, weights and entropy [2, N, K]
    labels_ptr,  # [N], the labels' loss; or None
    numbers, weight, label_weight,
    n,
    FIELDS: tl.constexpr,
    LOSSES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    samples = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = samples < n
    wide = tl.cast(n, tl.int64)
    cs = loss_scales(scales, numbers, LOSSES)
    of_teachers, of_labels = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    own = load_numbers(own_ptr, wide, samples, inside, len(scales))
    for side in tl.static_range(2):
        found = load_all(state_ptr + side * FIELDS * wide, wide, samples, inside, LOSSES)
        for k in tl.static_range(len(LOSSES)):
            s, targets = found[k], ()
            for m in tl.static_range(LOSSES[k]):
                targets = targets + (cs[k][m] * own[m],)
            if LOSSES[k] == 1:
                # The largest logit is subtracted before the own one is: large ones do not cancel.
                of_labels += 0.5 * (tl.log(s.sums[0]) - (targets[0] - s.tops[0]))
            else:
                s = Statistics(s.tops, s.sums, s.own, s.other, targets, s.totals)
                behind = side * (len(scales) - 1) * wide
                of_side, _ = teacher_kl.teachers_loss(
                    s, inputs, outputs, numbers, samples, inside, 1.0, behind
                )
                of_teachers += 0.5 * of_side
    if labels_ptr is not None:
        tl.store(labels_ptr + samples, of_labels, mask=inside)
    loss = weight * of_teachers + label_weight * of_labels
    tl.store(outputs.loss + samples, loss, mask=inside)


@triton.jit
def _expanded(numbers, COLUMNS: tl.constexpr):
    found = ()
    for i in tl.static_range(len(numbers)):
        found = found + (numbers[i][None, :] if COLUMNS else numbers[i][:, None],)
    return found


@jit_kernel
def pair_gradient(
    operands,  # see `Operands`
    logits,  # [n, N] float32 of every model, without their scales; None to multiply
    g_ptr,  # [n, g_stride] in the dtype of X, or None
    g_stride,
    state_ptr,  # [2, fields, N]
    weights_ptr,  # [2, N, K], those that were used; None without teachers
    of_scale_ptr,  # [column blocks, N]
    inputs,  # see `Inputs`
    numbers, weight, label_weight,
    first_row, n, total,  # sample of the first row, rows of this launch, N
    FIELDS: tl.constexpr,
    LOSSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(total, TILE.columns)
    i, j = tl.program_id(0) // parts, tl.program_id(0) % parts
    rows = i * TILE.rows + tl.arange(0, TILE.rows)
    columns = j * TILE.columns + tl.arange(0, TILE.columns)
    samples, pairs = first_row + rows.to(tl.int64), columns.to(tl.int64)
    inside, within = rows < n, columns < total
    wide = tl.cast(total, tl.int64)
    ys = logit_tiles(operands, logits, rows, samples, columns, n, total, total, TILE)
    cs = loss_scales(operands.scales, numbers, LOSSES)
    tile = tl.zeros_like(ys[0])
    # Of rows, then of columns.
    for side in tl.static_range(2):
        at, here = (pairs, within) if side else (samples, inside)
        half = 0.5 * teacher_kl.upstream_of(inputs, at, here)
        found = load_all(state_ptr + side * FIELDS * wide, wide, at, here, LOSSES)
        for k in tl.static_range(len(LOSSES)):
            log_sums, factors = (), ()
            for m in tl.static_range(LOSSES[k]):
                log_sums = log_sums + (tl.log(found[k].sums[m]),)
            tops, log_sums = _expanded(found[k].tops, side), _expanded(log_sums, side)
            if LOSSES[k] == 1:
                (factor,) = _expanded((label_weight * half,), side)
                tile += factor * tl.exp((cs[k][0] * ys[0] - tops[0]) - log_sums[0])
                if side == 0:
                    tile -= tl.where(samples[:, None] == pairs[None, :], 2.0 * factor, 0.0)
            else:
                factor = half * (weight * numbers.t * numbers.inverse_temperature)
                for m in tl.static_range(len(ys) - 1):
                    w_ptr = weights_ptr + (side * wide + at) * (len(ys) - 1) + m
                    factors = factors + (factor * tl.load(w_ptr, mask=here, other=0.0),)
                factors = _expanded(factors, side)
                tile += teacher_kl.softmax_differences(ys, cs[k], tops, log_sums, factors)
    active = inside[:, None] & within[None, :]
    tile = tl.where(active, tile, 0.0)
    share, factor = teacher_kl.factors_of(inputs, operands.scales[0], numbers.inverse_count)
    of_scale = share * tl.sum(tile * tl.where(active, ys[0], 0.0), 1)
    tl.store(of_scale_ptr + j * wide + samples, of_scale, mask=inside)
    if g_ptr is not None:
        at = g_ptr + rows.to(tl.int64)[:, None] * g_stride + columns[None, :]
        tl.store(at, (factor * tile).to(g_ptr.dtype.element_ty), mask=active)


def compute(
    leaves: tuple[Tensor, ...],
    request: Request,
    operands: Operands,
    numbers: Numbers,
    given: Tensor | None = None,  # weights of teachers [2, N, K]; None for those of the gate
    weight: float = 1.0,
    label_weight: float = 0.0,
) -> tuple[Tensor, ...]:
    """The results of at least one pair; with teachers, the labels' loss is the last detail."""
    n, models = len(leaves[0]), len(operands.x)
    k, labels = models - 1, label_weight != 0
    of_weights = given if given is None or not labels else given.abs().sum(-1, True).clamp(min=1)
    by_label, by_kl = abs(label_weight), abs(weight) * numbers.t * numbers.inverse_temperature
    gradients = Gradients(leaves, operands, request, None, by_label + by_kl, of_weights)
    numbers = numbers._replace(inverse_count=gradients.inverse_count)
    inputs = Inputs(weights=given).with_gradients(gradients)
    losses = (*((models,) if k else ()), *((1,) if labels else ()))
    fields = sum(4 * m - 2 for m in losses)

    # Rows of a chunk, of which the parts take no more memory than a block.
    tile = tile_of(operands, 1 << 20)
    width = ceil_div(n, tile.columns)
    most = max(MEMORY // (8 * fields * width * tile.rows), 1) * tile.rows
    step = min(n, most, gradients.rows(tile.rows))
    # Multiplied again, a logit takes 2 D operations; stored, 12 bytes are moved.
    logits: tuple[Tensor, ...] | None = None
    wide = operands.widths[0] * leaves[0].element_size() > 512
    if wide and step == n and 4 * models * n * n <= MEMORY:
        logits = new_float32(leaves[0], models, n, n).unbind()
        for x, w, y in zip(operands.x, operands.w, logits, strict=True):
            multiply(x, w.mT, y)

    row_parts = new_float32(leaves[0], width, fields, step)
    column_parts = new_float32(leaves[0], ceil_div(step, tile.rows), fields, n)
    own, state, last = new_float32(leaves[0], models, n), new_float32(leaves[0], 2, fields, n), None
    for first in range(0, n, step):
        rows, blocks = min(step, n - first), ceil_div(min(step, n - first), tile.rows)
        pair_statistics[(blocks * width,)](
            operands, logits, own, row_parts, column_parts, numbers, first, rows, n,
            fields, losses, tile, **tile.options(),
        )  # fmt: skip
        merge_parts[(ceil_div(rows, ROWS),)](
            row_parts, None, state[0], first, rows, n, width, fields, losses, ROWS, **OPTIONS
        )
        to = state[1] if first + step >= n else new_float32(leaves[0], fields, n)
        merge_parts[(ceil_div(n, ROWS),)](
            column_parts, last, to, 0, n, n, blocks, fields, losses, ROWS, **OPTIONS
        )
        last = to

    details = [new_float32(leaves[0], 2, n, k) for _ in range(3)] if k else []
    out = Outputs(new_float32(leaves[0], n), *details)
    details += [new_float32(leaves[0], n if labels else 0)] if k else []
    pair_losses[(ceil_div(n, ROWS),)](
        operands.scales, state, own, inputs, out, details[3] if k and labels else None, numbers,
        float(weight), float(label_weight), n, fields, losses, ROWS, **OPTIONS,
    )  # fmt: skip
    of_scale = new_float32(leaves[0], width, n) if gradients.any else None

    def launch(rows: slice, g: Tensor | None) -> None:
        size = rows.stop - rows.start
        pair_gradient[(ceil_div(size, tile.rows) * width,)](
            operands, logits, g, gradients.stride, state, out.weights, of_scale, inputs, numbers,
            float(weight), float(label_weight), rows.start, size, n, fields, losses, tile,
            **tile.options(),
        )  # fmt: skip

    if gradients.any:
        gradients.over_rows(tile.rows, launch)
    return gradients.results(out.loss, details, (of_scale,))


def pair_kl(x: PairKl, request: Request) -> tuple[Tensor, ...]:
    if len(x.image_features) == 0:
        return reference.run(OPERATORS["pair_kl"], x, request)
    operands = Operands.of(
        (x.image_features, *x.teacher_image_features),
        (x.text_features, *x.teacher_text_features),
        (x.logit_scale, *x.teacher_scales),
    )
    given = None if x.weights is None else x.weights.contiguous()
    return compute(x[:3], request, operands, Numbers.of(x), given, x.weight, x.label_weight)
