"""From what is asked of an operator to what its kernels take, and from what they found back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mulki.ops.logits import waiting

from . import common, sums
from .sums import Factors

if TYPE_CHECKING:
    from mulki.ops.operators import Request


def upstream(request: Request, n: int) -> Tensor | None:
    """The upstream gradient of each row, [N] (of two losses [2, N]) float32; None for 1."""
    grad = request.grad
    if grad is None:
        return None
    if request.reduction != "none":
        grad = grad.unsqueeze(-1).expand(*grad.shape, n)
    return common.as_float32(grad)


def inverse_count(request: Request, n: int) -> float:
    """What a mean over N rows multiplies their sum by; 1 for a sum."""
    return 1.0 / n if request.reduction == "mean" else 1.0


def dtype(request: Request, operand: Tensor) -> torch.dtype:
    """That of the gradient of X or W."""
    return waiting(operand) if request.grad is None else operand.dtype


def returned(
    request: Request,
    factors: Factors,
    leaves: Sequence[Tensor],
    losses: Tensor,  # [N], or [2, N] of two losses
    details: Sequence[Tensor],
    of_operands: Sequence[Tensor],  # dX and dW
    of_scalars: Sequence[Tensor | None],  # [N] contributions to each gradient of a scalar
) -> tuple[Tensor, ...]:
    """The results of an operator."""
    wanted = request.wanted[2:]
    asked = [t for t, want in zip(of_scalars, wanted, strict=True) if want and t is not None]
    rows = list(losses.unbind()) if losses.ndim == 2 else [losses]
    numbers = []
    if asked or (request.grad is None and request.reduction != "none"):
        numbers = sums.totals([*rows, *asked], factors)
    found, gradients = numbers[: len(rows)], iter(numbers[len(rows) :])
    if request.grad is not None:
        losses, details = losses.new_empty(0), [losses.new_empty(0) for _ in details]
    elif request.reduction != "none":
        losses = torch.stack(found) if losses.ndim == 2 else found[0]
    scalars = (
        next(gradients).to(dtype(request, leaf))
        if want
        else losses.new_empty(0, dtype=dtype(request, leaf))
        for leaf, want in zip(leaves[2:], wanted, strict=True)
    )
    return losses, *details, *of_operands, *scalars


def of_nothing(
    request: Request,
    leaves: Sequence[Tensor],
    rows: Sequence[int],  # shape of the loss without a reduction
    details: Sequence[Sequence[int]] = (),
) -> tuple[Tensor, ...]:
    """The results where there are no logits: all are zero, but for a mean over no rows, NaN."""
    value = float("nan") if request.reduction == "mean" and rows[-1] == 0 else 0.0
    if request.reduction != "none":
        rows = rows[:-1]
    if request.grad is not None:
        rows, details = (0,), [(0,)] * len(details)
    new: Any = leaves[0].new_full
    return (
        new(rows, value, dtype=torch.float32),
        *(new(shape, 0.0, dtype=torch.float32) for shape in details),
        *(
            new(leaf.shape if want else (0,), 0.0, dtype=dtype(request, leaf))
            for leaf, want in zip(leaves, request.wanted, strict=True)
        ),
    )
