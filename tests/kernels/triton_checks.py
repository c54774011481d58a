"""What must hold of every kernel wherever it runs: in the interpreter (small) and on a GPU.

A case is made and computed in float64 on the CPU, and moved to the device for the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mulki.kernels import schedule
from mulki.ops.logits import waiting
from tests.kernels.triton_cases import Case, make
from tests.kernels.triton_helpers import all_close, backward, call, close, reduced

Shape = tuple[int, int, int]  # N, P, D


class NumberFormat(NamedTuple):
    """How operands are stored and multiplied, and the relative L2 error that this allows."""

    dtype: torch.dtype
    tf32: bool
    operands: float  # of gradients to x and w, in their dtype
    sums: float  # of losses, which are float32
    cancelling: float  # of gradients to scale and bias, sums of both signs


# tf32 keeps 10 bits of an operand, bfloat16 7 and float16 10; a result is rounded to its dtype, and
# so is the gradient of the logits before it is multiplied. Losses of half precision are not.
NUMBER_FORMATS = {
    "fp32": NumberFormat(torch.float32, False, 2e-5, 2e-5, 1e-4),
    "tf32": NumberFormat(torch.float32, True, 3e-3, 3e-3, 2e-2),
    "bf16": NumberFormat(torch.bfloat16, False, 5e-3, 2e-5, 1e-4),
    "fp16": NumberFormat(torch.float16, False, 1e-3, 2e-5, 1e-4),
}


@contextmanager
def precision(number_format: NumberFormat) -> Iterator[None]:
    """PyTorch's setting for products of float32, for a while."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if number_format.tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def moved(value: Any, device: str) -> Any:
    """Arguments of an operator, or a case, on a device."""
    if isinstance(value, Case):
        return Case(value.op, tuple(moved(a, device) for a in value.args))
    if isinstance(value, list):
        return [moved(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def in_one_memory(case: Case, backwards: bool = False, apart: int = 0) -> Case:
    """A case whose teachers are as wide as the student, with X and W of all models in one memory.

    Args:
        backwards: whether the student lies last.
        apart: elements between those of two models.
    """
    x, w, scale, *of_teachers = case.args

    def laid(of_models: list[Tensor]) -> list[Tensor]:
        (n, d), order = of_models[0].shape, slice(None, None, -1 if backwards else 1)
        size = n * (d + 4) + apart  # rows are apart, too
        memory = of_models[0].new_full((len(of_models), size), torch.nan)
        places = [one[: n * (d + 4)].view(n, d + 4)[:, :d] for one in memory][order]
        for place, operand in zip(places, of_models, strict=True):
            place.copy_(operand[:, :d])
        return places

    (x, *teacher_x), (w, *teacher_w) = laid([x, *of_teachers[0]]), laid([w, *of_teachers[1]])
    return Case(case.op, (x, w, scale, teacher_x, teacher_w, *of_teachers[2:]))


def rows_and_gradients(name: str, number_format: NumberFormat, shape: Shape, device: str) -> None:
    """The loss of each row, or the similarity, and gradients for an upstream gradient per row."""
    case = make(name, number_format.dtype, *shape)
    upstream = case.upstream()
    rows, gradients = case.expected(upstream)
    here = moved(case, device)
    with precision(number_format):
        found = call(here.op, *here.args)[0]
        made = backward(here, upstream.to(device))
    close(
        found.cpu(),
        rows,
        number_format.sums if found.dtype == torch.float32 else number_format.operands,
    )
    _gradients_are_close(name, made, gradients, number_format)
    assert [g.dtype for g in made[:2]] == [number_format.dtype] * 2


def totals_and_gradients(name: str, number_format: NumberFormat, shape: Shape, device: str) -> None:
    """The mean of a loss, and the gradients made with it."""
    case = make(name, number_format.dtype, *shape)
    total, gradients = case.expected(mean=True)
    here = moved(case, device)
    with precision(number_format):
        found, made, _ = reduced(here)
    close(found.cpu(), total, number_format.sums)
    _gradients_are_close(name, made, gradients, number_format)
    assert [g.dtype for g in made] == list(map(waiting, here.args[: here.leaves]))


def _gradients_are_close(name: str, made: Any, wanted: Any, number_format: NumberFormat) -> None:
    # Normalised rows of half precision are rounded once more, before they are multiplied.
    half = name == "cosines" and number_format.dtype != torch.float32
    more = number_format.operands if half else 0.0
    all_close([g.cpu() for g in made[:2]], wanted[:2], number_format.operands + more)
    all_close([g.cpu() for g in made[2:]], wanted[2:], number_format.cancelling + 5 * more)


def repeats(name: str, number_format: NumberFormat, shape: Shape, device: str) -> None:
    """Two calls give the same bits, and leave their arguments as they were."""
    here = moved(make(name, number_format.dtype, *shape), device)
    before = [a.clone() if isinstance(a, Tensor) else a for a in here.args]
    upstream = here.upstream().to(device)
    with precision(number_format):
        runs = [everything(here, upstream) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    for one, other in zip(here.args, before, strict=True):
        assert not isinstance(one, Tensor) or torch.equal(one, other)


def everything(case: Case, upstream: Tensor) -> list[Tensor]:
    """Rows, their gradients, and of a loss the total with its gradients."""
    out = [*call(case.op, *case.args), *backward(case, upstream)]
    if case.op != "similarity":
        total, gradients, _ = reduced(case)
        out += [total, *gradients]
    return out


def every_plan(
    name: str,
    number_format: NumberFormat,
    shape: Shape,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> set[str]:
    """Everything is right whichever plan is taken; their schedules.

    All plans of whole rows, the largest blocks, and blocks that leave a part of rows and columns
    over.
    """
    n, p, _ = shape
    few = schedule.Plan("chunks", max(1, n // 2 - 1), p), schedule.Plan("blocks", n // 2 + 1, 32)
    tried = set()
    for i in range(4 + len(few)):

        def one_plan(problem: schedule.Problem, i: int = i) -> schedule.Plan:
            candidates = sorted(schedule.candidates(problem), key=lambda one: -one.rows)
            whole = [one for one in candidates if one.schedule == "rows"]
            plans = (*few, *whole, candidates[0], candidates[1 % len(candidates)])
            tried.add(plans[i % len(plans)].schedule)
            return plans[i % len(plans)]

        with monkeypatch.context() as patch:
            patch.setattr(schedule, "plan", one_plan)
            rows_and_gradients(name, number_format, shape, device)
            totals_and_gradients(name, number_format, shape, device)
    return tried
