"""Calls of kernels, and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mulki.kernels.lookup import kernel
from mulki.ops.operators import OPERATORS, Request
from tests.kernels.triton_cases import Case

# Relative L2 of a result: float32 sums of tens of terms, or one rounding to half precision (the
# interpreter cuts bfloat16 off).
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 4e-4}


def ask(
    case: Case, grad: Tensor | None, reduction: str, wanted: Sequence[bool] | None = None
) -> tuple[Tensor, ...]:
    """All results of a kernel; None asks for all gradients."""
    wanted = [True] * case.leaves if wanted is None else wanted
    x = OPERATORS[case.op].arguments(*case.args)
    return kernel(case.op)(x, Request(grad, reduction, wanted))


def call(op: str, *args: Any) -> tuple[Tensor, ...]:
    """The losses of rows, or the matrix, and the details."""
    case = Case(op, args)
    out = ask(case, None, "none", [False] * case.leaves)
    assert all(gradient.shape == (0,) for gradient in out[-case.leaves :])
    return out[: -case.leaves]


def backward(
    case: Case, grad: Tensor, wanted: Sequence[bool] | None = None, reduction: str = "none"
) -> Any:
    """The gradients for an upstream gradient, and nothing beside."""
    out = ask(case, grad, reduction, wanted)
    assert all(one.shape == (0,) for one in out[: -case.leaves])
    return out[-case.leaves :]


def reduced(case: Case, mean: bool = True, wanted: Sequence[bool] | None = None) -> Any:
    """The total, the gradients, and what is between them."""
    out = ask(case, None, "mean" if mean else "sum", wanted)
    return out[0], out[-case.leaves :], out[1 : -case.leaves]


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2, and infinite for a NaN."""
    want = want.detach().double()
    found = float((got.detach().double() - want).norm()) / max(float(want.norm()), 1e-12)
    return found if found == found else float("inf")


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert error(got, want) <= tolerance, (error(got, want), tolerance)


def all_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):
        close(one, other, tolerance)
