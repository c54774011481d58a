"""Where kernels go wrong that are right on ordinary inputs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.op_cases import (
    NAMES,
    Case,
    expected,
    first,
    form_arguments,
    make,
    requiring_grad,
    run,
)

ALL = [True] * 3


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def cross_entropy(
    x: Tensor, w: Tensor, target: list[int], mask: Tensor | None = None, scale: float = 9.0
) -> Case:
    return Case(
        "prototype_cross_entropy",
        (x, w, torch.tensor(scale), torch.tensor(target), mask, 0.0, -100),
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_an_excluded_class_holds_does_not_matter(bad, backend):
    for name in ("ce_all", "kl_label", "kl_weights"):
        case = make(name, n=6, p=8, d=5, dtype=torch.float32)
        want = first(run(case))
        for w in (case.args[1], *(case.args[4] if case.op == "teacher_kl" else ())):
            w[1] = bad  # class 1 is masked
        assert torch.equal(first(run(case)), want)


@pytest.mark.parametrize("d", [4, 80])
def test_an_ignored_row_has_no_gradient_whatever_it_holds(d, backend):
    x, w = torch.ones(3, d) / d, torch.eye(d)
    x[1] = 1e38
    case = cross_entropy(x, w, [0, -100, 2])
    total, dx, dw, dscale = run(form_arguments(case, "reduced", ALL))
    assert all(t.isfinite().all() for t in (total, dx, dw, dscale))
    assert dx[1].eq(0).all() and dx[0].ne(0).any()


def test_rows_of_very_different_sizes(backend):
    """Each row of a gradient is as good as float32, whatever the sizes of the rows beside it."""
    case = make("similarity", n=70, p=130, d=96, dtype=torch.float32)
    x, w, *rest = case.args
    sizes = torch.tensor([1e-12, 1e-5, 1.0, 1e5, 1e12])
    x, w = x * sizes.repeat(14)[:, None], w * sizes.repeat(26)[:, None]
    # What is multiplied by a large row has a small gradient, so that all rows of it count alike.
    grad = torch.rand(70, 130) / sizes.repeat(14)[:, None] / sizes.repeat(26)
    case = Case(case.op, (x, w, *rest))
    _, dx, dw = first(run(case)), *run(Case(case.op + "_backward", (grad, *case.args, ALL)))[:2]
    for got, g, rows in ((dx, grad, w), (dw, grad.T, x)):
        want = rest[0].double() * g.double() @ rows.double()
        errors = (got.double() - want).norm(dim=1) / want.norm(dim=1)
        assert errors.max() < 1e-6


def test_features_of_many_dimensions(backend):
    """Sums of integers must not overflow."""
    d = 50_000
    x, w = torch.full((2, d), 0.25), torch.full((3, d), -0.5)
    case = Case("similarity", (x, w, torch.tensor(1.0), False))
    torch.testing.assert_close(first(run(case)), torch.full((2, 3), -0.125 * d))


def test_rows_of_tiny_numbers(backend):
    x = make("ce", n=8, p=8, d=64, dtype=torch.float32).args[0]
    for size in (1e-20, 1e-29):
        case = Case("similarity", (x * size, x, torch.tensor(1.0), False))
        assert relative(first(run(case)), (x * size).double() @ x.double().T) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_an_upstream_gradient_that_is_not_finite_stays_with_its_row(bad, place, backend):
    case = make("ce", n=6, p=7, d=5, dtype=torch.float32)
    backward = form_arguments(case, "backward", ALL)
    (dx, _, _) = run(backward)
    grad = backward.args[0].clone()
    grad[place] = bad
    spoilt, dw, _ = run(Case(backward.op, (grad, *backward.args[1:])))
    others = torch.arange(6) != place
    assert not spoilt[place].isfinite().any() and not dw.isfinite().all()
    torch.testing.assert_close(spoilt[others], dx[others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_only_teacher_has_a_gradient_of_zero(dtype, backend):
    case = make("kl", n=9, p=300, d=20, dtype=dtype, scale=50.0)
    x, w, scale, *_ = case.args
    case = Case(case.op, (x, w, scale, [x], [w], scale.reshape(1), *case.args[6:]))
    total, kl, _, _, dx, dw, dscale = run(form_arguments(case, "reduced", ALL))
    for value in (total, kl, dx, dw, dscale):
        assert value.eq(0).all()


@pytest.mark.parametrize(("scale", "bias"), [(100.0, -60.0), (60.0, -40.0), (720.0, 0.0)])
def test_siglip_of_pairs_that_match_well_or_badly(scale, bias, backend):
    x = make("siglip", n=200, d=64, dtype=torch.float32).args[0]
    for w in (x, -x):
        case = Case("siglip", (x, w, torch.tensor(scale), torch.tensor(bias), 0))
        value, gradients = expected(case, True)
        got = run(form_arguments(case, "reduced", [True] * 4))
        for one, want in zip(got, (value, *gradients), strict=True):
            assert relative(one, want) < 2e-5


def test_siglip_of_a_match_beyond_any_number(backend):
    """It is as good as certain, so only the other columns have a loss."""
    x, w = torch.zeros(9, 8), torch.zeros(9, 8)
    x[5, 0] = w[5, 0] = 1e10
    total, *_ = run(
        form_arguments(
            Case("siglip", (x, w, torch.tensor(1e30), torch.tensor(-3.0), 0)),
            "reduced",
            [False] * 4,
            mean=False,
        )
    )
    # All logits but this one are the bias.
    wanted = 72 * math.log1p(math.exp(-3.0)) + 8 * math.log1p(math.exp(3.0))
    assert total.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("scale", [0.7, 1.0, 3.0, 50.0, 64.0, -3.0])
def test_a_class_that_is_infinitely_unlikely(scale, backend):
    """It counts for nothing in the loss, whatever the scale is rounded to."""
    x, w = torch.zeros(4, 70), torch.zeros(40, 70)
    x[:, 0], w[:, 0] = 10.0, torch.linspace(-0.5, 0.5, 40)
    target, others = torch.tensor([1, 2, 4, 5]), torch.arange(40) != 3
    wanted = F.cross_entropy(scale * (x @ w[others].T).double(), target - (target > 3).long())
    w[3, 0] = -math.copysign(3e38, scale)
    loss = run(
        Case("prototype_cross_entropy", (x, w, torch.tensor(scale), target, None, 0.0, -100))
    )
    assert loss.mean().item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [-(2**40), -150, -149, -1, 0, 1, 64, 299, 300, 2**40])
def test_a_block_of_siglip_at_any_offset(offset, dtype, backend):
    x, w, scale, bias, _ = make("siglip_block", n=150, p=300, d=20, dtype=dtype).args
    case = Case("siglip", (x, w, scale, bias, offset))
    value, gradients = expected(case, False)
    signs = torch.full((150, 300), -1.0)
    for i in range(150):
        if 0 <= i + offset < 300:
            signs[i, i + offset] = 1
    z = scale * (x.double() @ w.double().T) + bias
    torch.testing.assert_close(value, torch.log1p(torch.exp(-signs * z)).sum())
    got = run(form_arguments(case, "reduced", [True] * 4, mean=False))
    tolerance = 2e-5 if dtype == torch.float32 else 5e-3
    for one, want in zip(got, (value, *gradients), strict=True):
        assert relative(one, want) < tolerance


@pytest.mark.parametrize(("n", "p"), [(0, 3), (3, 0), (0, 0)])
def test_a_block_of_siglip_without_rows_or_columns(n, p, backend):
    x, w = torch.ones(n, 4), torch.ones(p, 4)
    case = Case("siglip", (x, w, torch.tensor(2.0), torch.tensor(-1.0), 0))
    assert run(case).tolist() == [0.0] * n
    got = run(form_arguments(case, "backward", [True] * 4))
    assert [g.shape for g in got] == [x.shape, w.shape, (), ()]
    total, *reduced = run(form_arguments(case, "reduced", [True] * 4, mean=False))
    assert total == 0 and all(g.eq(0).all() for g in (*got, *reduced))


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
    got = run(form_arguments(case, "reduced", ALL))
    for one, other, want in zip(got, unfused, (value, *gradients), strict=True):
        assert relative(one, want) < 3 * relative(other.detach(), want) + 1e-5


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


@pytest.mark.parametrize("name", NAMES)
def test_features_without_a_dimension(name, backend):
    case = make(name, n=4, p=5, d=1, dtype=torch.float32)
    x, w, scale, *rest = case.args
    if case.op == "teacher_kl":
        rest[:2] = [[u[:, :0] for u in rest[0]], [v[:, :0] for v in rest[1]]]
    case = Case(case.op, (x[:, :0], w[:, :0], scale, *rest))
    torch.testing.assert_close(first(run(case)), expected(case)[0].float(), rtol=1e-5, atol=1e-6)


def test_a_class_mask_without_a_class_is_refused(backend):
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    case = cross_entropy(x, w, [-100, -100], torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="class_mask"):
        run(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_onednn(dtype, backend):
    case = make("kl_label", n=20, p=33, d=24, dtype=dtype, scale=20.0)
    with_it = run(form_arguments(case, "reduced", ALL))
    with torch.backends.mkldnn.flags(enabled=False):
        without = run(form_arguments(case, "reduced", ALL))
    for one, other in zip(with_it, without, strict=True):
        assert relative(other, one.double()) < 1e-2 if one.norm() else other.eq(0).all()
    assert run(case)[0].isfinite().all()


@pytest.mark.parametrize("classes", [(0, 40), (130, 250), (390, 400)])
@pytest.mark.parametrize("name", ["ce_all", "kl_label"])
def test_the_classes_of_one_task_alone(name, classes, backend):
    """They are next to each other, so that whole tiles of columns have none of them."""
    low, high = classes
    case = make(name, n=70, p=400, d=9, dtype=torch.float32)
    mask = (torch.arange(400) >= low) & (torch.arange(400) < high)
    place = next(
        i for i, a in enumerate(case.args) if isinstance(a, Tensor) and a.dtype == mask.dtype
    )
    args = list(case.args)
    target = args[place - 1]
    args[place - 1 : place + 1] = torch.where(target < 0, target, low + target % (high - low)), mask
    case = Case(case.op, tuple(args))
    value, gradients = expected(case, True)
    total, *rest = run(form_arguments(case, "reduced", ALL))
    for one, want in zip((total, *rest[-3:]), (value, *gradients), strict=True):
        assert relative(one, want) < 1e-5
    assert rest[-2][~mask].eq(0).all()


def test_more_classes_than_a_super_block_was_made_for(backend):
    case = make("kl", n=70, p=25_000, d=3, dtype=torch.float32)
    value, gradients = expected(case, True)
    total, _, _, _, *got = run(form_arguments(case, "reduced", ALL))
    for one, want in zip((total, *got), (value, *gradients), strict=True):
        assert relative(one, want) < 1e-4


def test_more_teachers_than_two(backend):
    case = make("kl", n=5, p=9, d=4, dtype=torch.float32)
    x, w, scale, (u, _), (v, _), _, *rest = case.args
    k = 11
    scales = torch.linspace(3, 9, k)
    case = Case(case.op, (x, w, scale, [u] * k, [v] * k, scales, *rest))
    value, gradients = expected(case, True)
    total, _, _, _, *got = run(form_arguments(case, "reduced", ALL))
    for one, want in zip((total, *got), (value, *gradients), strict=True):
        assert relative(one, want) < 1e-4
