"""From the losses of all rows, and G's products, to the results of an operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mulki.ops.logits import wide
from mulki.ops.operators import Arguments, Operator, Request


def upstream_of_rows(request: Request) -> Tensor | None:
    """The upstream gradient of each row where there is one, [N]."""
    return request.grad if request.reduction == "none" else None


def upstream_of_all(x: Arguments, request: Request, count: Tensor | int | None) -> Tensor | float:
    """What the gradients of the rows' losses are multiplied by.

    Args:
        count: see `rows_of_mean`.
    """
    grad: Tensor | float = 1.0
    if request.grad is not None and request.reduction != "none":
        grad = request.grad.to(wide(x[0].dtype))
    if count is not None:
        # The mean over no rows has a gradient, zero.
        grad = grad / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
    return grad


def rows_of_mean(operator: Operator, x: Arguments, request: Request) -> Tensor | int | None:
    """How many rows the mean is over, a wide tensor where that depends on values; None: no mean."""
    if request.reduction != "mean":
        return None
    count = operator.averaged(x)
    return count.to(wide(x[0].dtype)) if isinstance(count, Tensor) else count


def bound(x: Tensor, *factors: Tensor | None) -> Tensor | None:
    """What no finite |G| is larger than: the largest of these products of rows; None for 1.

    Args:
        x: X; in float16 alone a bound is needed.
        factors: upstream gradients [N], and weights of teachers [N, K].
    """
    largest: Tensor | None = None
    for factor in factors if x.dtype == torch.float16 else ():
        if factor is not None and factor.numel():
            of_rows = factor.abs() if factor.ndim == 1 else factor.abs().sum(-1)
            one = of_rows.nan_to_num(0.0, 0.0).amax()
            # Zero would be divided by.
            largest = (one if largest is None else largest * one).clamp(min=1e-30)
    return largest


def of_teachers(kl: Tensor, weights: Tensor, entropy: Tensor) -> list[Tensor]:
    """The details [..., N, K] of these [..., K, N]; those of given weights are a copy."""
    return [
        kl.mT.contiguous(),
        weights.mT.clone(memory_format=torch.contiguous_format),
        entropy.mT.contiguous(),
    ]


def returned(
    request: Request,
    count: Tensor | int | None,  # see `rows_of_mean`
    rows: Tensor,  # the loss of each
    details: Sequence[Tensor],
    gradients: Sequence[Tensor],  # empty where not wanted
) -> tuple[Tensor, ...]:
    """The results of an operator."""
    if request.grad is not None:
        rows, details = rows.new_empty(0), [rows.new_empty(0) for _ in details]
    elif request.reduction != "none":
        rows = rows.sum(-1)
        if count is not None:
            rows = rows / count
    return rows, *details, *gradients
