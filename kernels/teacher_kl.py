# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""teacher_kl and prototype_cross_entropy: losses over the softmax of rows, in one launch.

Model m (0 is the student, K teachers follow) has logits z_m = c_m X_m W_m^T [N, P], c = scale / T,
q = softmax(z_0) and p_k = softmax(z_k). X [N, D_m] and W [P, D_m] are read, logits never written.

    teacher_kl             loss_i = sum_k w_ik KL_ik,  KL_ik = t sum_j p_ijk (log p_ijk - log q_ij),
                           t = T^2 or 1, w given or softmax over k of (a E_k[log p_k] + b log p_k
                           at the target) / gate temperature
                           G_ij = t / T sum_k w_ik (q_ij - p_ijk)
    cross-entropy, K = 0   loss_i = -(1 - e) log q_iy - e mean_j log q_ij, e the label smoothing
                           G_ij = q_ij - (1 - e) [j = y] - e / C

A program keeps BLOCK_N rows. It walks tiles of BLOCK_P classes, makes the logits of all models with
one tl.dot each, and keeps the statistics of its rows in registers, for every model

    top    max_j z_j              sum    sum_j e_j, with e_j = exp(z_j - top)
    own    sum_j e_j (z_j - top)  other  of a teacher: sum_j e_j (z'_j - top'), the student's z'

own / sum - log sum is E[log p], and other / sum - log sum' is E[log q]. They are the same number
where a teacher equals the student: KL is exactly zero then. When a top grows by d, sum, own and
other are those of the old top with e multiplied by exp(-d) (`merged`). Where gradients are wanted
the program walks the classes once more, with the logits computed again, and writes G. If a tile
holds all P, its logits are still there.

With `logits` the tiles are loaded instead: where products are so large that computing them again
costs more than memory, the block loop of `mulki.ops.chunked` stores logits of the library, a block
of rows at a time, and this kernel is its function of those rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mulki.ops import reference
from mulki.ops.chunked import blocks, rows
from mulki.ops.chunked.products import Products
from mulki.ops.operators import OPERATORS, Request
from mulki.ops.pair_kl import PairKl
from mulki.ops.teacher_kl import TeacherKl

from .gradients import Gradients
from .tiles import (
    Operands,
    Tile,
    as_bytes,
    ceil_div,
    dtype_of_g,
    jit_kernel,
    logit_tiles,
    new_float32,
    tile_of,
)

LOWEST = tl.constexpr(-1e30)  # a logit that does not take part; products with it are finite


class Inputs(NamedTuple):
    """What is read beside the logits; None is what a loss does without."""

    target: Tensor | None = None  # [N] int64
    class_mask: Tensor | None = None  # [P] uint8, nonzero takes part
    weights: Tensor | None = None  # [N, K], or None for those of the gate
    upstream: Tensor | None = None  # [N], or None for 1
    upstream_stride: int = 0
    count: Tensor | None = None  # 0-d, the rows of a mean; None for `inverse_count`
    factor: Tensor | None = None  # 0-d, of G when it is written; None for scale / count

    def with_gradients(self, gradients: Gradients) -> Inputs:
        """The same with what is known of the upstream gradient and of the factors of G."""
        upstream = gradients.upstream
        stride = 0 if upstream is None else upstream.stride(0)
        last = gradients.count, gradients.factor
        return Inputs(self.target, self.class_mask, self.weights, upstream, stride, *last)


class Outputs(NamedTuple):
    """What is written, float32."""

    loss: Tensor  # [N]
    kl: Tensor | None = None  # [N, K], as the next two
    weights: Tensor | None = None
    entropy: Tensor | None = None
    of_scale: Tensor | None = None  # [N], what each row adds to the gradient of the scale


class Numbers(NamedTuple):
    inverse_temperature: float = 1.0
    entropy_factor: float = 0.0  # a / gate temperature
    label_factor: float = 0.0  # b / gate temperature
    t: float = 1.0  # T^2 or 1
    smoothing: float = 0.0
    inverse_count: float = 1.0

    @classmethod
    def of(cls, x: TeacherKl | PairKl) -> Numbers:
        factors = x.gate_entropy / x.gate_temperature, x.gate_label / x.gate_temperature
        t = x.temperature**2 if x.scale_by_t2 else 1.0
        return cls(1.0 / x.temperature, *factors, t)


class Statistics(NamedTuple):
    """Of rows [BLOCK_N]: tuples with a tensor of every model, or of every teacher."""

    tops: Any
    sums: Any
    own: Any  # of every teacher
    other: Any  # of every teacher
    targets: Any  # z at the target
    totals: Any  # sum_j z_j, of the student alone


@triton.jit
def no_statistics(zero, MODELS: tl.constexpr):
    """Those of no classes; `zero` are zeros of the shape of a row's number."""
    tops, numbers = (), ()
    for _ in tl.static_range(MODELS):
        tops, numbers = tops + (zero + LOWEST,), numbers + (zero,)
    teachers = ()
    for _ in tl.static_range(MODELS - 1):
        teachers = teachers + (zero,)
    return Statistics(tops, numbers, teachers, teachers, numbers, (zero,))


@triton.jit
def statistics_of(ys, cs, active, is_target, WITH_TARGET: tl.constexpr, WITH_TOTAL: tl.constexpr):
    """Those of one tile; its logits are c y, of as many models as there are c."""
    tops, sums, own, other, targets = (), (), (), (), ()
    for m in tl.static_range(len(cs)):
        z = tl.where(active, cs[m] * ys[m], LOWEST)
        top = tl.max(z, 1)
        below = z - top[:, None]
        e = tl.exp(below)
        tops, sums = tops + (top,), sums + (tl.sum(e, 1),)
        target = tl.zeros_like(top)
        if WITH_TARGET:
            target = tl.sum(tl.where(is_target, z, 0.0), 1)
        targets = targets + (target,)
        if m == 0:
            below_student = below
            total = tl.zeros_like(top)
            if WITH_TOTAL:
                total = tl.sum(tl.where(active, z, 0.0), 1)
        else:
            own = own + (tl.sum(e * below, 1),)
            other = other + (tl.sum(e * below_student, 1),)
    return Statistics(tops, sums, own, other, targets, (total,))


@triton.jit
def merged(a, b):
    """The statistics of two parts of the classes together."""
    tops, sums, own, other, targets = (), (), (), (), ()
    for m in tl.static_range(len(a.tops)):
        top = tl.maximum(a.tops[m], b.tops[m])
        change_a, change_b = a.tops[m] - top, b.tops[m] - top
        e_a, e_b = tl.exp(change_a), tl.exp(change_b)
        tops = tops + (top,)
        sums = sums + (e_a * a.sums[m] + e_b * b.sums[m],)
        targets = targets + (a.targets[m] + b.targets[m],)
        if m == 0:
            student_a, student_b = change_a, change_b
        else:
            of_a = e_a * (a.own[m - 1] + a.sums[m] * change_a)
            own = own + (of_a + e_b * (b.own[m - 1] + b.sums[m] * change_b),)
            of_a = e_a * (a.other[m - 1] + a.sums[m] * student_a)
            other = other + (of_a + e_b * (b.other[m - 1] + b.sums[m] * student_b),)
    return Statistics(tops, sums, own, other, targets, (a.totals[0] + b.totals[0],))


@triton.jit
def teachers_loss(statistics, inputs, outputs, numbers, samples, inside, known, behind):
    """Write KL, weights and entropies of rows; return the loss and the weights of teachers.

    `known` is 1, or NaN for a row whose target is no class. In memory a row's numbers lie `behind`
    the place of its sample.
    """
    K: tl.constexpr = len(statistics.own)
    at = behind + samples * K
    log_sum_student = tl.log(statistics.sums[0])
    kls, scores = (), ()
    for k in tl.static_range(K):
        total = statistics.sums[k + 1]
        log_sum = tl.log(total)
        mean_log_p = statistics.own[k] / total - log_sum
        mean_log_q = statistics.other[k] / total - log_sum_student
        kl = numbers.t * (mean_log_p - mean_log_q)
        tl.store(outputs.kl + at + k, kl, mask=inside)
        tl.store(outputs.entropy + at + k, -mean_log_p, mask=inside)
        kls = kls + (kl,)
        if inputs.weights is not None:
            given = tl.load(inputs.weights + at + k, mask=inside, other=0.0)
            scores = scores + (given.to(tl.float32),)
        else:
            log_p = (statistics.targets[k + 1] - statistics.tops[k + 1]) - log_sum
            of_label = numbers.label_factor * (known * log_p)
            scores = scores + (numbers.entropy_factor * mean_log_p + of_label,)
    normalizer = tl.full(inside.shape, 1.0, tl.float32)
    if inputs.weights is None:
        top, shares = scores[0], ()
        for k in tl.static_range(1, K):
            top = tl.maximum(top, scores[k])
        normalizer = tl.zeros(inside.shape, tl.float32)
        for k in tl.static_range(K):
            shares = shares + (tl.exp(scores[k] - top),)
            normalizer += shares[k]
        scores = shares
    loss, weights = tl.zeros(inside.shape, tl.float32), ()
    for k in tl.static_range(K):
        weights = weights + (scores[k] / normalizer,)
        tl.store(outputs.weights + at + k, weights[k], mask=inside)
        loss += weights[k] * kls[k]
    return loss, weights


@triton.jit
def softmax_differences(ys, cs, tops, log_sums, factors):
    """sum_k factor_k (softmax(z_0) - softmax(z_k)), each difference zero where a teacher is the
    student; tops, log_sums and factors [BLOCK_N, 1], or [1, BLOCK_P] of columns."""
    q = tl.exp((cs[0] * ys[0] - tops[0]) - log_sums[0])
    g = tl.zeros_like(q)
    for k in tl.static_range(len(factors)):
        p = tl.exp((cs[k + 1] * ys[k + 1] - tops[k + 1]) - log_sums[k + 1])
        g += factors[k] * (q - p)
    return g


@triton.jit
def model_scales(scales, inverse_temperature):
    """c of every model."""
    cs = ()
    for m in tl.static_range(len(scales)):
        cs = cs + (tl.load(scales[m]).to(tl.float32) * inverse_temperature,)
    return cs


@triton.jit
def upstream_of(inputs, samples, inside):
    """The upstream gradient of rows."""
    g = tl.full(inside.shape, 1.0, tl.float32)
    if inputs.upstream is not None:
        at = inputs.upstream + samples * inputs.upstream_stride
        g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return g


@triton.jit
def factors_of(inputs, scale_ptr, inverse_count):
    """1 / count, and what G is multiplied by when it is written."""
    if inputs.count is not None:
        inverse_count = 1.0 / tl.maximum(tl.load(inputs.count), 1.0)
    factor = inverse_count * tl.load(scale_ptr).to(tl.float32)
    if inputs.factor is not None:
        factor = tl.load(inputs.factor)
    return inverse_count, factor


@triton.jit
def active_classes(columns, p, mask_ptr):
    """Which columns take part, [1, BLOCK_P]."""
    active = columns < p
    if mask_ptr is not None:
        active = active & (tl.load(mask_ptr + columns, mask=active, other=0) != 0)
    return active[None, :]


@jit_kernel
def row_losses(
    operands,  # of the models, see `Operands`
    logits,  # [n, P] float32 of every model, without their scales; or None
    g_ptr,  # [n, g_stride] in the dtype of X, or None
    g_stride,
    inputs,  # see `Inputs`
    outputs,  # see `Outputs`
    numbers,  # see `Numbers`
    first_row, n, total, p,  # sample of the first row, rows of this launch, N, P
    ignore_index,
    GRADIENT: tl.constexpr,  # whether G is made
    SMOOTHED: tl.constexpr,
    WHOLE: tl.constexpr,  # a tile has all classes
    TILE: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = TILE.rows
    BLOCK_P: tl.constexpr = TILE.columns
    MODELS: tl.constexpr = len(operands.scales)
    WITH_TARGET: tl.constexpr = inputs.target is not None
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    samples = first_row + rows.to(tl.int64)
    cs = model_scales(operands.scales, numbers.inverse_temperature)
    target, known = tl.full([BLOCK_N], -1, tl.int64), tl.full([BLOCK_N], 1.0, tl.float32)
    if WITH_TARGET:
        target = tl.load(inputs.target + samples, mask=inside, other=0)
        valid = (target >= 0) & (target < p)
        if inputs.class_mask is not None:
            valid = valid & (tl.load(inputs.class_mask + target, mask=valid, other=0) != 0)
        known = tl.where(valid, 1.0, float("nan"))

    # The first walk: statistics.
    lanes = tl.arange(0, BLOCK_P)
    classes = tl.zeros([BLOCK_P], tl.int32)
    if WHOLE:
        ys = logit_tiles(operands, logits, rows, samples, lanes, n, total, p, TILE)
        active = active_classes(lanes, p, inputs.class_mask)
        is_target = lanes[None, :] == target[:, None]
        statistics = statistics_of(ys, cs, active, is_target, WITH_TARGET, SMOOTHED)
        classes += tl.sum(active.to(tl.int32), 0)
    else:
        statistics = no_statistics(tl.zeros([BLOCK_N], tl.float32), MODELS)
        for start in range(0, p, BLOCK_P):
            columns = start + lanes
            ys = logit_tiles(operands, logits, rows, samples, columns, n, total, p, TILE)
            active = active_classes(columns, p, inputs.class_mask)
            is_target = columns[None, :] == target[:, None]
            of_tile = statistics_of(ys, cs, active, is_target, WITH_TARGET, SMOOTHED)
            statistics = merged(statistics, of_tile)
            classes += tl.sum(active.to(tl.int32), 0)

    # Of each row: the loss, and its numbers in G.
    share, factor = factors_of(inputs, operands.scales[0], numbers.inverse_count)
    g = upstream_of(inputs, samples, inside)
    smoothing, class_count = numbers.smoothing, tl.sum(classes, 0).to(tl.float32)
    if MODELS == 1:
        ignored = target == ignore_index
        log_sum = tl.log(statistics.sums[0])
        log_q = (statistics.targets[0] - statistics.tops[0]) - log_sum
        loss = -(1.0 - smoothing) * log_q
        if SMOOTHED:
            loss -= smoothing * (
                (statistics.totals[0] / class_count - statistics.tops[0]) - log_sum
            )
        tl.store(outputs.loss + samples, tl.where(ignored, 0.0, known * loss), mask=inside)
        g = tl.where(ignored, 0.0, known * g)
    else:
        loss, weights = teachers_loss(
            statistics, inputs, outputs, numbers, samples, inside, known, 0
        )
        tl.store(outputs.loss + samples, loss, mask=inside)
        g *= numbers.t * numbers.inverse_temperature

    # The second walk: G.
    if GRADIENT:
        tops, log_sums, of_teachers = (), (), ()
        for m in tl.static_range(MODELS):
            tops = tops + (statistics.tops[m][:, None],)
            log_sums = log_sums + (tl.log(statistics.sums[m])[:, None],)
        for k in tl.static_range(MODELS - 1):
            of_teachers = of_teachers + ((g * weights[k])[:, None],)
        of_scale = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, BLOCK_P if WHOLE else p, BLOCK_P):
            columns = start + lanes
            active_of_g = active_classes(columns, p, inputs.class_mask)
            if WHOLE:
                ys_of_g = ys
            else:
                ys_of_g = logit_tiles(operands, logits, rows, samples, columns, n, total, p, TILE)
            if MODELS == 1:
                q = tl.exp((cs[0] * ys_of_g[0] - tops[0]) - log_sums[0])
                is_target = columns[None, :] == target[:, None]
                tile = g[:, None] * (q - tl.where(is_target, 1.0 - smoothing, 0.0))
                if SMOOTHED:
                    tile -= (g * smoothing / class_count)[:, None]
                # An ignored row has no gradient, whatever it holds.
                active_of_g = active_of_g & (g != 0)[:, None]
            else:
                tile = softmax_differences(ys_of_g, cs, tops, log_sums, of_teachers)
            tile = tl.where(active_of_g, tile, 0.0)
            of_scale += tl.sum(tile * tl.where(active_of_g, ys_of_g[0], 0.0), 1)
            if g_ptr is not None:
                at = g_ptr + rows.to(tl.int64)[:, None] * g_stride + columns[None, :]
                tile = (factor * tile).to(g_ptr.dtype.element_ty)
                tl.store(at, tile, mask=inside[:, None] & (columns < p)[None, :])
        tl.store(outputs.of_scale + samples, share * of_scale, mask=inside)


def compute(
    operands: Operands,
    inputs: Inputs,
    outputs: Outputs,
    numbers: Numbers,
    gradients: Gradients,
    ignore_index: int = -1,
) -> None:
    """Write a loss over the softmax of rows, at least one, and add up the gradients."""
    total, p = len(operands.x[0]), len(operands.w[0])
    inputs = inputs.with_gradients(gradients)
    numbers = numbers._replace(inverse_count=gradients.inverse_count)

    def launch(
        rows: slice, g: Tensor | None, tile: Tile, logits: tuple[Tensor, ...] | None = None
    ) -> None:
        n = rows.stop - rows.start
        row_losses[(ceil_div(n, tile.rows),)](
            operands, logits, g, 0 if g is None else g.stride(0), inputs, outputs, numbers,
            rows.start, n, total, p, ignore_index, gradients.any, numbers.smoothing != 0,
            tile.columns >= p, tile, **tile.options(),
        )  # fmt: skip

    def whole(u: Tensor, spare: Tensor, rows: slice, with_g: bool) -> Tensor:
        # From unscaled logits [1 + K, n, P] of rows to their losses, and G in the memory beside.
        g = spare[0].view(dtype_of_g(operands.x[0]))[:, :p]
        columns = min(triton.next_power_of_2(p), 4096 // len(u))
        stored = Tile(1, 16 if u.device.type == "cpu" else columns, 16, 8, 1)
        launch(rows, g if with_g else None, stored, u.unbind())
        return g

    tile = tile_of(operands, total)
    # A logit again is 2 D operations. Stored and loaded it is 8 bytes: less, from some D on.
    size = operands.widths[0] * operands.x[0].element_size()
    if size > 2048 and p > tile.columns and gradients.any:
        models = [Products(*of) for of in zip(operands.x, operands.w, strict=True)]
        if len(blocks.Blocks.of(models, rows._WHOLE, True).columns) == 1:
            loop: Any = rows.visit
            loop(SimpleNamespace(models=models, whole=whole), gradients)
            return
    gradients.over_rows(tile.rows, lambda rows, g: launch(rows, g, tile))


def teacher_kl(x: TeacherKl, request: Request) -> tuple[Tensor, ...]:
    n, k = len(x.features), len(x.teacher_features)
    if n == 0:
        return reference.run(OPERATORS["teacher_kl"], x, request)
    operands = Operands.of(
        (x.features, *x.teacher_features),
        (x.prototypes, *x.teacher_prototypes),
        (x.scale, *x.teacher_scales),
    )
    weights = None if x.weights is None else x.weights.contiguous()
    labelled, numbers = weights is None and x.gate_label != 0, Numbers.of(x)
    largest = numbers.t * numbers.inverse_temperature
    gradients = Gradients(x[:3], operands, request, None, largest, weights)
    loss, of_scale = (new_float32(x.features, n) for _ in range(2))
    kl, used, entropy = (new_float32(x.features, n, k) for _ in range(3))
    target = x.target.contiguous() if labelled and x.target is not None else None
    inputs = Inputs(target, as_bytes(x.class_mask), weights)
    compute(operands, inputs, Outputs(loss, kl, used, entropy, of_scale), numbers, gradients)
    return gradients.results(loss, (kl, used, entropy), (of_scale,))
