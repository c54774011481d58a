"""What the references share: logits without rounding, and reductions of rows."""

from __future__ import annotations

import pytest
import torch

from mulki.ops.logits import logits, reduce, reduced_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_multiplied_in_float32_even_under_autocast(unit, dtype):
    x, w = unit(6, 4).to(dtype), unit(5, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        z = logits(x, w, 9.0)
    assert z.dtype == torch.float32
    assert z.equal(9.0 * (x.float() @ w.float().T))
    assert logits(x.double(), w.double(), torch.tensor(9.0)).dtype == torch.float64


def test_masked_classes_have_probability_zero(unit):
    x, w, mask = unit(6, 4), unit(5, 4), torch.tensor([True, False, True, True, False])
    z = logits(x, w, 9.0, mask)
    assert z.softmax(1)[:, ~mask].eq(0).all()
    assert z[:, mask].equal(logits(x, w, 9.0)[:, mask])


def test_reductions_of_rows():
    rows = torch.tensor([1.0, 2.0, 6.0])
    assert reduce(rows, "none") is rows
    assert reduce(rows, "sum") == 9 and reduce(rows, "mean") == 3
    assert reduce(rows, "mean", count=2) == 4.5


@pytest.mark.parametrize("mean", [False, True])
def test_the_gradient_of_a_reduction_is_that_of_autograd(mean):
    rows = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    total, gradient = reduced_rows(rows, mean)
    assert gradient.equal(torch.autograd.grad(total, rows)[0])
    total, gradient = reduced_rows(torch.empty(0), mean)
    assert (total.isnan() if mean else total == 0) and gradient.shape == (0,)
