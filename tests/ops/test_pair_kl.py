"""What pair_kl alone does: both directions of a distillation, and the labels' loss beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.op_cases import (
    Case,
    asking,
    expected,
    make,
    relative,
    run,
)
from tests.ops.rounding import DTYPES, check, ours

PAIRS = ("pairs", "pairs_label", "pairs_blend", "pairs_weights")


@pytest.mark.parametrize("scale", [100.0, 1e3, 1e4])
def test_gradients_of_rows_at_large_logits(scale, backend):
    """A student whose logits all are equal, as its teacher's are, has the gradient zero."""
    case = make("pairs", n=3, d=1, dtype=torch.float32)
    ones, k = torch.ones(3, 1), len(case.args[3])
    leaves = *(ones.clone().requires_grad_() for _ in range(2)), torch.tensor(scale)
    teachers = [ones] * k, [ones] * k, [torch.tensor(scale)] * k
    loss = run(Case("pair_kl", (*leaves, *teachers, *case.args[6:])))[0]
    for gradient in torch.autograd.grad(loss.sum(), leaves[:2]):
        assert gradient.abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_it_is_the_weighted_sum_of_two_operators(name, dtype, mean, backend):
    weight, label_weight = 0.5, 2.0
    case = make(name, n=70, d=24, dtype=dtype, scale=20.0)
    labels = Case("contrastive", case.args[:3])
    alone = Case(case.op, (*case.args[:-2], 1.0, 0.0))
    of_labels, of_teachers = (
        (value, *gradients) for value, gradients in (expected(labels, mean), expected(alone, mean))
    )
    wanted = [label_weight * a + weight * b for a, b in zip(of_labels, of_teachers, strict=True)]
    # Half precision may round G before it is multiplied.
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    both = Case(case.op, (*case.args[:-2], weight, label_weight))
    loss, *_, beside, dx, dw, ds = run(asking(both, "reduced", mean=mean))
    for got, want in zip((loss, dx, dw, ds), wanted, strict=True):
        assert relative(got, want) < rounding + 2e-5
    assert relative(beside.mean() if mean else beside.sum(), of_labels[0]) < 2e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("n", [5, 200])
def test_a_teacher_that_is_the_student_leaves_no_gradient(n, temperature, backend):
    x, w, scale, *_ = make("pairs", n=n, d=24, dtype=torch.float32, scale=50.0).args
    gate = 1.0, 0.0, 0.0
    args = x, w, scale, [x], [w], [scale], None, temperature, *gate, True, 1.0, 0.0
    total, kl, *_, dx, dw, ds = run(asking(Case("pair_kl", args), "reduced"))
    assert abs(total) < 1e-5 and kl.abs().max() < 1e-4
    assert dx.eq(0).all() and dw.eq(0).all() and ds == 0


@pytest.mark.parametrize("op", ["pair_kl", "contrastive"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [0.0, -100.0, 300.0])
@pytest.mark.parametrize("spread", [1.0, 25.0, 200.0])
def test_logits_far_from_zero_or_from_one_another(spread, level, dtype, op, backend):
    """Then a row and a column share no exponentials. The last tile of columns is not full."""
    torch.manual_seed(0)
    n, d = 200, 16

    def features() -> list[Tensor]:
        rows = [F.normalize(torch.randn(n, d), dim=1) * torch.rand(n, 1).sqrt() for _ in range(2)]
        rows[0][:, 0], rows[1][:, 0] = 1.0, level / spread
        return [row.to(dtype) for row in rows]

    scale = torch.tensor(spread)
    case = Case("contrastive", (*features(), scale))
    if op == "pair_kl":
        teachers = [features() for _ in range(2)]
        of_teachers = [[teacher[i] for teacher in teachers] for i in (0, 1)]
        options = None, 1.0, 1.0, 0.0, 0.0, True, 1.0, 0.0
        case = Case(op, (*case.args, *of_teachers, [scale, scale], *options))
    # Halves of G times large numbers that it cancels are as imprecise without fusing.
    if dtype == torch.float32:
        check(case, True)
    for out in ours(case, True):
        assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "n"), [("pairs_label", 1700), ("contrastive", 2600)])
def test_more_pairs_than_products_are_kept_of(name, n, dtype, backend):
    """24 MiB are kept: of 1448 pairs with two teachers, of 2508 without; by C++ alone."""
    check(make(name, n=n, d=16, dtype=dtype, scale=20.0), True)
