"""Calls of kernels, and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mulki.kernels import kernel
from tests.kernels.triton_cases import Case

# Relative L2 of a result: float32 sums of tens of terms, or one rounding to half precision (the
# interpreter cuts bfloat16 off).
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 4e-4}


def call(op: str, *args: Any) -> tuple[Tensor, ...]:
    out = kernel(op)(*args)
    return out if isinstance(out, tuple) else (out,)


def backward(case: Case, upstream: Tensor, wanted: Sequence[bool] | None = None) -> Any:
    args = case.args
    if case.op == "contrastive":
        args = (*args, *call(case.op, *args)[1:])
    if case.op == "pair_kl":
        _, _, used, _, lse = call(case.op, *args)
        args = (*args[:6], used, lse, args[7], args[11])
    if case.op == "teacher_kl":
        used = call(case.op, *args)[2]
        args = (*args[:6], used, args[8], args[9], args[13])
    return call(f"{case.op}_backward", upstream, *args, wanted or [True] * case.leaves)


def reduced(case: Case, mean: bool = True, wanted: Sequence[bool] | None = None) -> Any:
    """The total, the gradients, and what is between them."""
    out = call(f"{case.op}_reduced", *case.args, mean, wanted or [True] * case.leaves)
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
