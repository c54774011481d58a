"""What prototype_cross_entropy alone does: rows that are ignored, classes that are unlikely."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.ops.op_cases import ALL, Case, asking, cross_entropy, make, run, with_argument


@pytest.mark.parametrize("d", [4, 80])
def test_an_ignored_row_has_no_gradient_whatever_it_holds(d, backend):
    x, w = torch.ones(3, d) / d, torch.eye(d)
    x[1] = 1e38
    case = cross_entropy(x, w, [0, -100, 2])
    total, dx, dw, dscale = run(asking(case, "reduced", ALL))
    assert all(t.isfinite().all() for t in (total, dx, dw, dscale))
    assert dx[1].eq(0).all() and dx[0].ne(0).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_ignored_row_that_is_not_finite(value, classes, smoothing, backend):
    """Loss and gradients of features; that of a prototype is a sum of products with the row."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 7), torch.randn(classes, 7)
    case = with_argument(cross_entropy(x, w, [0, -100, 2, -100, 1]), 5, smoothing)
    total, want, *_ = run(asking(case, "reduced", [True, False, False]))
    x[1], x[3, 2] = value, value
    loss = run(case)[0]
    assert loss[[1, 3]].eq(0).all() and loss.isfinite().all()
    again, dx, *_ = run(asking(case, "reduced", [True, False, False]))
    assert torch.equal(again, total) and torch.equal(dx, want)
    (dx,) = [g for g in run(asking(case, "backward", [True, False, False])) if g.numel()]
    assert dx[[1, 3]].eq(0).all() and dx.isfinite().all()


@pytest.mark.parametrize("scale", [0.7, 1.0, 3.0, 50.0, 64.0, -3.0])
def test_a_class_that_is_infinitely_unlikely(scale, backend):
    """It counts for nothing in the loss, whatever the scale is rounded to."""
    x, w = torch.zeros(4, 70), torch.zeros(40, 70)
    x[:, 0], w[:, 0] = 10.0, torch.linspace(-0.5, 0.5, 40)
    target, others = torch.tensor([1, 2, 4, 5]), torch.arange(40) != 3
    wanted = F.cross_entropy(scale * (x @ w[others].T).double(), target - (target > 3).long())
    w[3, 0] = -math.copysign(3e38, scale)
    loss, *_ = run(
        Case("prototype_cross_entropy", (x, w, torch.tensor(scale), target, None, 0.0, -100))
    )
    assert loss.mean().item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_rows_ignored(dtype, backend):
    case = make("ce_all", dtype=dtype)
    case.args[3].fill_(-100)
    assert run(case)[0].eq(0).all()
    for mean in (False, True):
        total, *gradients = run(asking(case, "reduced", [True] * 3, mean))
        assert total.isnan() if mean else total == 0
        for gradient in gradients:
            assert gradient.eq(0).all()
