"""What contrastive alone does: two softmax over one matrix, and a bias that they do not see."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mulki import ops
from mulki.ops.checks import REDUCTIONS
from tests.ops.op_cases import (
    ALL,
    Case,
    asking,
    expected,
    make,
    relative,
    requiring_grad,
    run,
)


@pytest.mark.parametrize("scale", [30.0, 60.0])
def test_contrastive_of_pairs_that_match_well(scale, backend):
    """The loss is what a logarithm of 1 and a little leaves."""
    x = make("contrastive", n=200, d=64, dtype=torch.float32, seed=1).args[0]
    case = Case("contrastive", (x, x, torch.tensor(scale)))
    value, gradients = expected(case, True)
    plain = requiring_grad(case)
    with torch.enable_grad():
        z = plain.args[2] * plain.args[0] @ plain.args[1].T
        y = torch.arange(200)
        loss = (F.cross_entropy(z, y) + F.cross_entropy(z.T, y)) / 2
    unfused = [loss, *torch.autograd.grad(loss, plain.args)]
    got = run(asking(case, "reduced", ALL))
    for one, other, want in zip(got, unfused, (value, *gradients), strict=True):
        assert relative(one, want) < 3 * relative(other.detach(), want) + 1e-5


@pytest.mark.parametrize("scale", [100.0, 1e3, 1e4])
def test_gradients_of_rows_at_large_logits(scale, backend):
    """Equal pairs have the gradient zero, however large their logits are."""
    ones = [torch.ones(2, 1, requires_grad=True) for _ in range(2)]
    leaves = *ones, torch.tensor(scale, requires_grad=True)
    loss = run(Case("contrastive", leaves))[0]
    gradients = torch.autograd.grad(loss.sum(), leaves)
    assert max(gradient.abs().max() for gradient in gradients) <= 1e-6 * scale


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_what_a_bad_row_of_contrastive_holds_stays_there(bad, backend):
    """It is in a sum of every column, where -infinity adds nothing."""
    torch.manual_seed(0)
    x, w = (torch.rand(300, 4) + 0.1 for _ in range(2))
    x[290] = bad
    loss, *_ = run(Case("contrastive", (x, w, torch.tensor(1.0))))
    z = x.double() @ w.double().T
    rows, columns, match = z.logsumexp(1), z.logsumexp(0), z.diagonal()
    torch.testing.assert_close(
        loss.double(), (rows + columns) / 2 - match, rtol=1e-5, atol=1e-5, equal_nan=True
    )
    assert loss.isfinite().sum() == (299 if bad == -math.inf else 0)


def test_a_logit_bias_under_a_softmax_has_a_gradient_of_zero(unit):
    x, w = unit(6, 4), unit(6, 4)
    for reduction in REDUCTIONS:
        bias = torch.tensor(-3.0, requires_grad=True)
        loss = ops.contrastive.loss((x, w, 9.0), bias, reduction)
        loss.sum().backward()
        assert bias.grad is not None and bias.grad == 0
        assert loss.equal(ops.contrastive.loss((x, w, 9.0), None, reduction))
