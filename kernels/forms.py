"""The forms of an operator: what a loss has made of its rows becomes gradients, a sum or a mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunks, gradients, sums
from .chunks import Products
from .common import Model
from .gradients import LogitGradient


class Made(NamedTuple):
    """What is known once all rows have been seen."""

    loss: Tensor  # [N]
    slopes: tuple[Tensor, ...]  # [N] each, shares of the gradients of scale and bias
    gradient: LogitGradient
    details: tuple[Tensor, ...] = ()  # [N, K] each
    products: Products | None = None  # with G, where they have been formed on the way


# Makes rows [first, last), with their logits where they are stored.
Rows = Callable[[int, int, list[Tensor] | None], Made]


def make(
    models: Sequence[Model], wanted: Sequence[bool], rows: Rows, peak: Tensor | None = None
) -> Made:
    """All rows at once, or in chunks; `peak` bounds their |G| (None: 1)."""
    n = models[0].x.shape[0]
    size = chunks.row_chunks(models) if any(wanted[:2]) else 0
    if size == 0:
        made = rows(0, n, None)
        return made._replace(gradient=replace(made.gradient, peak=peak))
    parts: list[Made] = []

    def step(first: int, last: int, stored: list[Tensor]) -> LogitGradient:
        parts.append(rows(first, last, stored))
        return replace(parts[-1].gradient, peak=peak)

    products = chunks.run(models, size, wanted, step)
    return Made(
        torch.cat([part.loss for part in parts]),
        tuple(map(torch.cat, zip(*(part.slopes for part in parts), strict=True))),
        replace(parts[-1].gradient, peak=peak),
        tuple(map(torch.cat, zip(*(part.details for part in parts), strict=True))),
        products,
    )


def backward(made: Made, wanted: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """dx and dw in `dtype`, and the gradients of numbers; the upstream gradient is in `made`."""
    numbers = [
        slopes.sum() if asked else slopes.new_empty(0)
        for slopes, asked in zip(made.slopes, wanted[2:], strict=True)
    ]
    return [*_operand_gradients(made, wanted, dtype), *numbers]


def reduced(
    made: Made,
    mean: bool,
    wanted: Sequence[bool],
    target: Tensor | None = None,
    ignore_index: int = 0,
) -> list[Tensor]:
    """The sum, or the mean over rows whose target is not ignored; its gradients in float32."""
    asked = [slopes for slopes, want in zip(made.slopes, wanted[2:], strict=True) if want]
    (total, *found), share = sums.totals([made.loss, *asked], mean, target, ignore_index)
    numbers = [found.pop(0) if want else share.new_empty(0) for want in wanted[2:]]
    made = made._replace(gradient=replace(made.gradient, share=share if mean else None))
    return [total, *_operand_gradients(made, wanted, torch.float32), *numbers]


def _operand_gradients(made: Made, wanted: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    g, out = made.gradient, []
    for swap in (False, True):
        if not wanted[swap]:
            out.append(g.scale.new_empty(0, dtype=dtype))
        elif made.products is None:
            out.append(gradients.operand_gradient(g, swap, dtype))
        else:
            raw = made.products[swap]
            assert raw is not None
            # A float32 result takes the place of the sums.
            done = raw if dtype == torch.float32 else raw.new_empty(raw.shape, dtype=dtype)
            sums.add_parts(raw.unsqueeze(0), done, g.scale, g.share, g.peak, g.lift)
            out.append(done)
    return out


def without_rows(x: Tensor, w: Tensor, wanted: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """The gradients of a loss of no rows: x and w in `dtype`, then numbers."""
    numbers = len(wanted) - 2
    shapes = (x.shape, w.shape, *[()] * numbers)
    dtypes = (dtype, dtype, *[torch.float32] * numbers)
    return [
        x.new_zeros(shape if asked else 0, dtype=of)
        for shape, of, asked in zip(shapes, dtypes, wanted, strict=True)
    ]


def total_of_no_rows(x: Tensor, mean: bool) -> Tensor:
    empty = mean and x.shape[0] == 0
    return x.new_full((), float("nan") if empty else 0.0, dtype=torch.float32)
