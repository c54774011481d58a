"""From the losses of rows to what an operator returns: gradients, and a sum or a mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import sums
from .sums import Factors


class RowResults(NamedTuple):
    """What a loss computes for its rows; gradients that were not asked for are None or empty."""

    loss: Tensor  # [N]
    # [N] of each: contributions to dL/dscale (and dL/dbias)
    scalar_gradients: Sequence[Tensor | None]
    operand_gradients: list[Tensor]  # dX and dW
    details: Sequence[Tensor] = ()  # [N, K] each


def backward_outputs(results: RowResults, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """dX and dW, then the 0-d gradients, of `results` for an upstream gradient."""
    found = [values.sum() for values in _asked(results, wanted)]
    return *results.operand_gradients, *_scalars(results, wanted, found)


def reduced_outputs(
    results: RowResults, wanted: Sequence[bool], factors: Factors
) -> tuple[Tensor, ...]:
    """The sum or mean over rows, the details, and the gradients in float32."""
    total, *found = sums.totals([results.loss, *_asked(results, wanted)], factors)
    scalars = _scalars(results, wanted, found)
    return total, *results.details, *results.operand_gradients, *scalars


def _asked(results: RowResults, wanted: Sequence[bool]) -> list[Tensor]:
    pairs = zip(results.scalar_gradients, wanted[2:], strict=True)
    return [values for values, want in pairs if want and values is not None]


def _scalars(results: RowResults, wanted: Sequence[bool], found: list[Tensor]) -> list[Tensor]:
    none = results.operand_gradients[0].new_empty(0, dtype=torch.float32)
    return [found.pop(0) if want else none for want in wanted[2:]]


def backward_of_no_rows(
    features: Tensor, prototypes: Tensor, wanted: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The gradients of a loss without rows, which are zero: dX and dW in `dtype`, then 0-d ones."""
    scalars = len(wanted) - 2
    shapes = (features.shape, prototypes.shape, *[()] * scalars)
    dtypes = (dtype, dtype, *[torch.float32] * scalars)
    return tuple(
        features.new_zeros(shape if asked else 0, dtype=dtype)
        for shape, dtype, asked in zip(shapes, dtypes, wanted, strict=True)
    )


def reduced_of_no_rows(
    features: Tensor,
    prototypes: Tensor,
    mean: bool,
    wanted: Sequence[bool],
    details: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """The total of a loss without rows (NaN for a mean over no samples), then its gradients."""
    empty_mean = mean and features.shape[0] == 0
    total = features.new_full((), float("nan") if empty_mean else 0.0, dtype=torch.float32)
    return total, *details, *backward_of_no_rows(features, prototypes, wanted, torch.float32)
