# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""prototype_cross_entropy: -(1 - e) log q_y - e mean_j log q_j, q = softmax(scale x W^T).

`row_softmax` walks over P; `cross_entropy_rows` merges its splits, one row per lane, and writes the
loss and, for the gradient dL/dz_j = g (q_j - (1 - e) [j = y] - e / kept), what `gradients` wants to
know of the row and the row's share of dL/dscale. A target outside [0, P), or of a class that the
mask excludes, makes its row NaN; nothing is read for it.
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
def cross_entropy_rows(
    stats_ptr,  # [splits, 1, 5, N]
    scale_ptr,  # 0-d
    target_ptr,  # [N] int64
    mask_ptr,  # [P] uint8, or None
    kept_ptr,  # 0-d, classes that take part; None for all
    upstream_ptr,  # [N], or None for 1
    loss_ptr,  # [N]
    rows_ptr,  # [4, N] top, weight, uniform, hit; or None for the loss alone
    slopes_ptr,  # [N] share of dL/dscale
    n,
    p,
    models,
    splits,
    ignore_index,
    smoothing,
    SMOOTHED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    samples = tl.minimum(rows, n - 1).to(tl.int64)
    c2, c, sign = scale_of(scale_ptr, 1.0)
    top, sum, own, total, _ = merged(stats_ptr, 0, samples, None, c2, n, models, splits, SPLITS)
    hit = merged_hit(stats_ptr, 0, samples, n, models, splits, SPLITS)

    target = tl.load(target_ptr + samples)
    ignored = target == ignore_index
    valid = (target >= 0) & (target < p)
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + tl.where(valid, target, 0)) != 0)
    known = tl.where(valid, 1.0, float("nan"))
    log_sum = tl.log(sum)
    to_target = hit - top
    loss = -(1.0 - smoothing) * (c * to_target - log_sum)
    if SMOOTHED:
        if kept_ptr is None:
            kept = tl.cast(p, tl.float32)
        else:
            kept = tl.load(kept_ptr)
        to_mean = total / kept - top
        loss -= smoothing * (c * to_mean - log_sum)
    tl.store(loss_ptr + rows, tl.where(ignored, 0.0, loss * known), mask=inside)

    if rows_ptr is not None:
        g = known
        if upstream_ptr is not None:
            g = known * tl.load(upstream_ptr + samples)
        g = tl.where(ignored, 0.0, g)
        slope = own / sum - (1.0 - smoothing) * to_target
        uniform = 0.0 * g
        if SMOOTHED:
            slope -= smoothing * to_mean
            uniform = g * smoothing / kept
        n = tl.cast(n, tl.int64)
        tl.store(rows_ptr + rows, top, mask=inside)
        tl.store(rows_ptr + n + rows, g / sum, mask=inside)
        tl.store(rows_ptr + 2 * n + rows, uniform, mask=inside)
        tl.store(rows_ptr + 3 * n + rows, g * (1.0 - smoothing), mask=inside)
        tl.store(slopes_ptr + rows, tl.where(ignored, 0.0, sign * g * slope), mask=inside)


class _Arguments(NamedTuple):
    x: Tensor  # [N, D]
    w: Tensor  # [P, D]
    scale: Tensor  # 0-d
    target: Tensor  # [N] int64
    class_mask: Tensor | None  # [P] bool
    label_smoothing: float
    ignore_index: int


def _checked(arguments: Sequence[Any]) -> _Arguments:
    a = _Arguments(*arguments)
    checks.operands(a.x, a.w, a.scale)
    checks.labels(a.x, a.w, a.target, a.class_mask)
    return a


def _made(a: _Arguments, upstream: Tensor | None, wanted: Sequence[bool]) -> Made:
    """Losses of at least one row, and what the wanted gradients need."""
    model = Model.of(a.x, a.w)
    scale, target = common.flat(a.scale), a.target.contiguous()
    mask = common.bytes_of(a.class_mask)
    smoothed = a.label_smoothing != 0
    kept = mask.sum(dtype=torch.float32) if smoothed and mask is not None else None
    upstream = None if upstream is None else common.flat(upstream)
    peak = None
    if upstream is not None and a.x.dtype == torch.float16:
        peak = upstream.masked_fill(target == a.ignore_index, 0).abs().amax()

    def rows(first: int, last: int, stored: list[Tensor] | None) -> Made:
        part, y = Model(model.x[first:last], model.w), target[first:last]
        found = row_softmax.statistics(
            [part],
            scale,
            class_mask=mask,
            target=y,
            hits=row_softmax.TARGET,
            smoothed=smoothed,
            stored=stored,
        )
        n = last - first
        loss, slopes = common.empty(scale, n), common.empty(scale, n)
        of_rows = common.empty(scale, 4, n) if any(wanted) else None
        launch(
            cross_entropy_rows,
            (ceil_div(n, found.rows),),
            loss.device,
            warps=4,
            stages=1,
            **found.arguments,
            scale_ptr=scale,
            target_ptr=y,
            mask_ptr=mask,
            kept_ptr=kept,
            upstream_ptr=None if upstream is None else upstream[first:last],
            loss_ptr=loss,
            rows_ptr=of_rows,
            slopes_ptr=slopes,
            n=n,
            p=a.w.shape[0],
            ignore_index=a.ignore_index,
            smoothing=a.label_smoothing,
            SMOOTHED=smoothed,
            ROWS=found.rows,
        )
        gradient = LogitGradient(
            gradients.SOFTMAX, [part], scale, of_rows, class_mask=mask, target=y
        )
        return Made(loss, (slopes,), gradient)

    return forms.make([model], wanted, rows, peak)


NONE = (False, False, False)


def prototype_cross_entropy(*arguments: Any) -> Tensor:
    """The loss of each row, [N] float32; 0 where ignored."""
    a = _checked(arguments)
    if a.x.shape[0] == 0:
        return a.x.new_empty(0, dtype=torch.float32)
    return _made(a, None, NONE).loss


def prototype_cross_entropy_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """dx, dw, dscale for an upstream gradient per row."""
    *forward, wanted = arguments
    a = _checked(forward)
    checks.shape("grad", grad, a.x.shape[:1])
    if a.x.shape[0] == 0:
        return tuple(forms.without_rows(a.x, a.w, wanted, a.x.dtype))
    return tuple(forms.backward(_made(a, grad, wanted), wanted, a.x.dtype))


def prototype_cross_entropy_reduced(*arguments: Any) -> tuple[Tensor, ...]:
    """The sum or mean over the rows that are not ignored; dx, dw, dscale in float32."""
    *forward, mean, wanted = arguments
    a = _checked(forward)
    if a.x.shape[0] == 0:
        none = forms.without_rows(a.x, a.w, wanted, torch.float32)
        return forms.total_of_no_rows(a.x, mean), *none
    made = _made(a, None, wanted)
    return tuple(forms.reduced(made, mean, wanted, a.target.contiguous(), a.ignore_index))
