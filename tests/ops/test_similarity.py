"""What similarity alone shows: products of rows of any size, and rows that are normalised."""

from __future__ import annotations

import torch

from tests.ops.op_cases import ALL, Case, asking, expected, make, relative, run


def test_rows_of_very_different_sizes(backend):
    """Each row of a gradient is as good as float32, whatever the sizes of the rows beside it."""
    case = make("similarity", n=70, p=130, d=96, dtype=torch.float32)
    x, w, *rest = case.args
    sizes = torch.tensor([1e-12, 1e-5, 1.0, 1e5, 1e12])
    x, w = x * sizes.repeat(14)[:, None], w * sizes.repeat(26)[:, None]
    # What is multiplied by a large row has a small gradient, so that all rows of it count alike.
    grad = torch.rand(70, 130) / sizes.repeat(14)[:, None] / sizes.repeat(26)
    case = Case(case.op, (x, w, *rest))
    _, dx, dw, _ = run(Case(case.op, (*case.args, grad, "none", ALL)))
    for got, g, rows in ((dx, grad, w), (dw, grad.T, x)):
        want = rest[0].double() * g.double() @ rows.double()
        errors = (got.double() - want).norm(dim=1) / want.norm(dim=1)
        assert errors.max() < 1e-6


def test_features_of_many_dimensions(backend):
    """Sums of integers must not overflow."""
    d = 50_000
    x, w = torch.full((2, d), 0.25), torch.full((3, d), -0.5)
    case = Case("similarity", (x, w, torch.tensor(1.0), False))
    torch.testing.assert_close(run(case)[0], torch.full((2, 3), -0.125 * d))


def test_rows_of_tiny_numbers(backend):
    x = make("ce", n=8, p=8, d=64, dtype=torch.float32).args[0]
    for size in (1e-20, 1e-29):
        case = Case("similarity", (x * size, x, torch.tensor(1.0), False))
        assert relative(run(case)[0], (x * size).double() @ x.double().T) < 1e-6


def test_a_row_of_zeros_has_a_gradient_when_normalised():
    case = make("cosines")
    case.args[0][1] = 0
    _, gradients = expected(case)
    _, *got = run(asking(case, "backward"))
    for a, b in zip(got, gradients, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b)


def test_bfloat16_without_onednn(backend):
    """torch's products would be slow, and would round what the gradient of the scale adds up."""
    case = make("similarity", n=64, p=30, d=40, dtype=torch.bfloat16)
    _, (*_, want) = expected(case)
    with torch.backends.mkldnn.flags(enabled=False):
        *_, got = run(asking(case, "backward", ALL))
    assert relative(got, want) < 1e-5
