"""From the losses of rows to what an operator returns: gradients, and a sum or a mean.

Each loss gives a function that computes some rows. `compute` calls it for all rows at once, or for
one chunk after another (`chunks`). `backward_outputs` and `reduced_outputs` then make the results
of the operator's `_backward` and `_reduced` forms.
"""

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


class RowResults(NamedTuple):
    """What a loss computes for its rows."""

    loss: Tensor  # [N]
    scalar_gradients: tuple[Tensor, ...]  # [N] of each: contributions to dL/dscale (and dL/dbias)
    gradient: LogitGradient
    details: tuple[Tensor, ...] = ()  # [N, K] each
    products: Products | None = None  # products with G, where chunks have computed them


# Computes rows [first, last). The third argument has their logits of every model, or is None.
ComputeRows = Callable[[int, int, list[Tensor] | None], RowResults]


def compute(
    models: Sequence[Model],
    wanted: Sequence[bool],
    compute_rows: ComputeRows,
    bound: Tensor | None = None,
) -> RowResults:
    """All rows, at once or in chunks; no |G| is greater than `bound` (None: 1)."""
    n = models[0].features.shape[0]
    size = chunks.chunk_rows(models) if any(wanted[:2]) else 0
    if size == 0:
        results = compute_rows(0, n, None)
        return results._replace(gradient=replace(results.gradient, bound=bound))
    of_chunks: list[RowResults] = []

    def step(first: int, last: int, logits: list[Tensor]) -> LogitGradient:
        of_chunks.append(compute_rows(first, last, logits))
        return replace(of_chunks[-1].gradient, bound=bound)

    products = chunks.run(models, size, wanted, step)
    return RowResults(
        torch.cat([one.loss for one in of_chunks]),
        tuple(map(torch.cat, zip(*(one.scalar_gradients for one in of_chunks), strict=True))),
        replace(of_chunks[-1].gradient, bound=bound),
        tuple(map(torch.cat, zip(*(one.details for one in of_chunks), strict=True))),
        products,
    )


def backward_outputs(
    results: RowResults, wanted: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    """dX and dW in `dtype`, then the 0-d gradients, of `results` for an upstream gradient."""
    scalars = [
        contributions.sum() if asked else contributions.new_empty(0)
        for contributions, asked in zip(results.scalar_gradients, wanted[2:], strict=True)
    ]
    return [*_operand_gradients(results, wanted, dtype), *scalars]


def reduced_outputs(
    results: RowResults,
    mean: bool,
    wanted: Sequence[bool],
    target: Tensor | None = None,
    ignore_index: int = 0,
) -> list[Tensor]:
    """The sum, or the mean over rows whose target is not ignored; its gradients in float32."""
    contributions = zip(results.scalar_gradients, wanted[2:], strict=True)
    asked = [values for values, want in contributions if want]
    values = [results.loss, *asked]
    (total, *found), mean_factor = sums.totals(values, mean, target, ignore_index)
    scalars = [found.pop(0) if want else mean_factor.new_empty(0) for want in wanted[2:]]
    gradient = replace(results.gradient, mean_factor=mean_factor if mean else None)
    results = results._replace(gradient=gradient)
    return [total, *_operand_gradients(results, wanted, torch.float32), *scalars]


def _operand_gradients(
    results: RowResults, wanted: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    g, gradients_of_operands = results.gradient, []
    for swap in (False, True):
        if not wanted[swap]:
            out = g.scale.new_empty(0, dtype=dtype)
        elif results.products is None:
            out = gradients.operand_gradient(g, swap, dtype)
        else:
            product = results.products[swap]
            assert product is not None
            # A float32 result is written over the product.
            in_place = dtype == torch.float32
            out = product if in_place else product.new_empty(product.shape, dtype=dtype)
            parts = product.unsqueeze(0)
            sums.add_parts(parts, out, g.scale, g.mean_factor, g.bound, g.range_factor)
        gradients_of_operands.append(out)
    return gradients_of_operands


def backward_of_no_rows(
    features: Tensor, prototypes: Tensor, wanted: Sequence[bool], dtype: torch.dtype
) -> list[Tensor]:
    """The gradients of a loss without rows, which are zero: dX and dW in `dtype`, then 0-d ones."""
    scalars = len(wanted) - 2
    shapes = (features.shape, prototypes.shape, *[()] * scalars)
    dtypes = (dtype, dtype, *[torch.float32] * scalars)
    return [
        features.new_zeros(shape if asked else 0, dtype=dtype)
        for shape, dtype, asked in zip(shapes, dtypes, wanted, strict=True)
    ]


def reduced_of_no_rows(
    features: Tensor, prototypes: Tensor, mean: bool, wanted: Sequence[bool]
) -> list[Tensor]:
    """The total of a loss without rows (NaN for a mean over no samples), then its gradients."""
    empty_mean = mean and features.shape[0] == 0
    total = features.new_full((), float("nan") if empty_mean else 0.0, dtype=torch.float32)
    return [total, *backward_of_no_rows(features, prototypes, wanted, torch.float32)]
