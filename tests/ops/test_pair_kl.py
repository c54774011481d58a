"""What pair_kl alone does: both directions of a distillation, and the labels' loss beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from mulki.ops import direct
from tests.ops.op_cases import (
    OPS,
    Case,
    arguments,
    asking,
    doubled,
    expected,
    make,
    relative,
    requiring_grad,
    run,
    specification,
    with_argument,
)
from tests.ops.rounding import DTYPES, check, ours

PAIRS = ("pairs", "pairs_label", "pairs_blend", "pairs_weights")


def with_labels(case: Case) -> Case:
    """The same case with the labels' loss beside it."""
    return with_argument(case, 12, True)


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
def test_with_labels_it_is_the_sum_of_two_operators(name, dtype, mean, backend):
    case = make(name, n=70, d=24, dtype=dtype, scale=20.0)
    labels = Case("contrastive", case.args[:3])
    (first, *of_labels), (second, *of_teachers) = (
        (value, *gradients) for value, gradients in (expected(labels, mean), expected(case, mean))
    )
    wanted = first, second, *(a + b for a, b in zip(of_labels, of_teachers, strict=True))
    # Half precision may round G before it is multiplied.
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    losses, _, _, _, *gradients = run(asking(with_labels(case), "reduced", mean=mean))
    for got, want in zip((*losses, *gradients), wanted, strict=True):
        assert relative(got, want) < rounding + 2e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("upstream", [(1.0, 1.0), (3.0, 3.0), (0.5, 2.0), (1.0, 0.0)])
def test_both_losses_may_have_any_upstream_gradient(upstream, temperature, backend):
    case = with_argument(make("pairs", n=9, dtype=torch.float32), 7, temperature)
    double = requiring_grad(Case(case.op, tuple(map(doubled, case.args))))
    of_labels = specification(Case("contrastive", double.args[:3]))
    losses = torch.stack([of_labels.mean(), specification(double).mean()])
    total = upstream[0] * losses[0] + upstream[1] * losses[1]
    wanted = torch.autograd.grad(total, double.args[:3])
    case = requiring_grad(case)
    both = asking(with_labels(case), "reduced")
    for call in (lambda: run(both), lambda: direct.call("pair_kl", arguments(both), "mean")):
        first, second = call()[0]
        got = torch.autograd.grad(upstream[0] * first + upstream[1] * second, case.args[:3])
        for one, want in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, want.float(), rtol=1e-4, atol=1e-6)


def test_rows_of_both_losses(backend):
    case = requiring_grad(make("pairs_blend", dtype=torch.float32))
    both = asking(with_labels(case), "rows")
    upstream = torch.rand(2, 6)
    alone = [run(Case("contrastive", case.args[:3]))[0], run(case)[0]]
    got = torch.autograd.grad((upstream * run(both)[0]).sum(), case.args[:3])
    want = torch.autograd.grad((upstream * torch.stack(alone)).sum(), case.args[:3])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_was_not_computed_is_refused():
    case = make("pairs")
    leaves = [leaf.clone().requires_grad_() for leaf in case.args[:3]]
    case = with_labels(Case(case.op, (*leaves, *case.args[3:])))
    losses, *_ = run(asking(case, "reduced", [True, False, True]))
    with pytest.raises(RuntimeError, match=r"wanted\[1\]: got False"):
        losses.sum().backward()


def test_opcheck_with_labels(backend):
    case = make("pairs_label", dtype=torch.float64 if backend == "reference" else torch.float32)
    opcheck(OPS.pair_kl.default, asking(with_labels(requiring_grad(case)), "reduced").args)


def test_compiled_losses_have_any_upstream_gradient():
    case = make("pairs", dtype=torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in case.args[:3]]

    def loss(*leaves: Tensor) -> Tensor:
        losses, *_ = run(asking(with_labels(Case(case.op, (*leaves, *case.args[3:]))), "reduced"))
        return losses[0] + 2 * losses[1]

    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("upstream", [[1.0, 1.0], [1.0, 2.0]])
def test_gradients_of_transposed_features_have_the_strides_that_are_promised(upstream):
    case = make("pairs", n=8, d=16, dtype=torch.float32)
    columns = Case(case.op, (case.args[0].T.contiguous().T, *case.args[1:]))
    *args, _, reduction, wanted = asking(with_labels(columns), "reduced").args
    stored = run(asking(with_labels(columns), "reduced"))[-3:]
    given = stored, *args, torch.tensor(upstream), reduction, wanted
    opcheck(OPS.pair_kl_gradients.default, given, test_utils="test_faketensor")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("n", [5, 200])
def test_a_teacher_that_is_the_student_leaves_no_gradient(n, temperature, backend):
    x, w, scale, *_ = make("pairs", n=n, d=24, dtype=torch.float32, scale=50.0).args
    gate = 1.0, 0.0, 0.0
    args = x, w, scale, [x], [w], [scale], None, temperature, *gate, True, False
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
        options = None, 1.0, 1.0, 0.0, 0.0, True, False
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
