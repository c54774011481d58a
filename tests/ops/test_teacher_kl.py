"""What teacher_kl alone does: many teachers, dtypes that differ, weights, a student near them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from mulki import functional, ops
from mulki.ops.gates import Weighting, discrepancy_weights
from mulki.ops.logits import wide
from tests.ops.op_cases import (
    ALL,
    Case,
    asking,
    expected,
    make,
    relative,
    run,
    with_argument,
)
from tests.ops.rounding import DTYPES, EPS, HALVES, check, error, ours, widened

UNIFORM = Weighting.of("uniform")


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_student_near_its_teacher_keeps_its_gradient(dtype, gap, backend):
    """Where continual learning starts, and where rounded logits leave nothing of the gradient."""
    case = make("kl", n=64, p=100, d=64, dtype=dtype, scale=50.0, gap=gap)
    for mean in (None, True):
        check(case, mean)
    if dtype in HALVES:
        _, (truth, *_) = expected(case, True)
        wanted = [True, False, False]
        fused = run(asking(case, "reduced", wanted))[4]
        assert error(fused, truth) < error(unfused(case), truth) / 4


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_teachers_far_from_their_student(scale, backend):
    """Few elements of a row of the gradient by the logits are then far larger than the others."""
    case = make("kl", n=96, p=600, d=256, dtype=torch.float32, scale=scale, gap=3.0)
    truth = expected(case, True)[1][:2]
    fused, wide = ours(case, True)[1:3], widened(case, True)[1:3]
    for got, plain, want in zip(fused, wide, truth, strict=True):
        assert error(got, want) <= 2 * error(plain, want) + EPS * want.norm().item()


def unfused(case: Case) -> Tensor:
    """The gradient by the features, logits rounded to the dtype of the inputs."""
    x, w, scale, teacher_x, teacher_w, scales, *_ = case.args
    temperature = case.args[9]
    leaf = x.clone().requires_grad_()
    log_q = F.log_softmax(scale.to(x.dtype) * (leaf @ w.T) / temperature, dim=1).float()
    loss = torch.zeros(())
    for u, v, s in zip(teacher_x, teacher_w, scales, strict=True):
        log_p = F.log_softmax(s.to(x.dtype) * (u @ v.T) / temperature, dim=1).float()
        kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        loss = loss + temperature**2 * kl / len(teacher_x)
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_student_that_is_its_teacher(dtype, backend):
    case = make("kl", n=9, p=33, d=20, dtype=dtype, scale=50.0, gap=0.0)
    case = Case(case.op, (*case.args[:3], [case.args[0]] * 2, [case.args[1]] * 2, *case.args[5:]))
    total, kl, _, _, *gradients = run(asking(case, "reduced", [True] * 3))
    # Every logit is rounded alike, so nothing is left but the difference of two logarithms.
    assert total.abs() < 50 * EPS and kl.abs().max() < 200 * EPS
    for gradient, size in zip(gradients, (50, 50, 1), strict=True):
        assert gradient.abs().max() <= 4 * EPS * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_only_teacher_has_a_gradient_of_zero(dtype, backend):
    case = make("kl", n=9, p=300, d=20, dtype=dtype, scale=50.0)
    x, w, scale, *_ = case.args
    case = Case(case.op, (x, w, scale, [x], [w], scale.reshape(1), *case.args[6:]))
    total, kl, _, _, dx, dw, dscale = run(asking(case, "reduced", ALL))
    for value in (total, kl, dx, dw, dscale):
        assert value.eq(0).all()


def test_more_classes_than_a_super_block_was_made_for(backend):
    case = make("kl", n=70, p=25_000, d=3, dtype=torch.float32)
    value, gradients = expected(case, True)
    total, _, _, _, *got = run(asking(case, "reduced", ALL))
    for one, want in zip((total, *got), (value, *gradients), strict=True):
        assert relative(one, want) < 1e-4


def test_more_teachers_than_two(backend):
    case = make("kl", n=5, p=9, d=4, dtype=torch.float32)
    x, w, scale, (u, _), (v, _), _, *rest = case.args
    k = 11
    scales = torch.linspace(3, 9, k)
    case = Case(case.op, (x, w, scale, [u] * k, [v] * k, scales, *rest))
    value, gradients = expected(case, True)
    total, _, _, _, *got = run(asking(case, "reduced", ALL))
    for one, want in zip((total, *got), (value, *gradients), strict=True):
        assert relative(one, want) < 1e-4


@pytest.mark.parametrize("distil", [functional.teacher_kl, functional.pair_teacher_kl])
def test_a_teacher_of_two_dtypes_is_named(distil):
    x = torch.eye(4)
    student = functional.Similarity(x, x, 1.0)
    with torch.autocast("cpu"):
        mixed = functional.Similarity(x, x.bfloat16(), 1.0)
    with pytest.raises(TypeError, match=r"^teachers\[1\]\.prototypes: got dtype torch.bfloat16"):
        distil(student, [student, mixed])


@pytest.mark.parametrize("form", ["rows", "reduced"])
def test_double_backward_through_weights_raises(form):
    case = make("kl_weights")
    features, weights = case.args[0].requires_grad_(), case.args[6].requires_grad_()
    if form == "reduced":
        case = asking(case, "reduced", [True, False, False])
    leaves = [features, weights]
    for i, leaf in itertools.product(range(2), leaves):
        gradients = torch.autograd.grad(run(case)[0].sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradients[i].square().sum(), leaf, allow_unused=True)


@pytest.mark.parametrize("reduced", [False, True])
def test_gradcheck_of_given_weights(reduced):
    case = make("kl_weights", n=3, p=4, d=2)
    weights = case.args[6].requires_grad_()

    def loss(weights):
        given = Case(case.op, (*case.args[:6], weights, *case.args[7:]))
        if reduced:
            given = asking(given, "reduced", [False] * 3)
        return run(given)[0]

    assert gradcheck(loss, [weights])


def test_the_weights_that_come_back_are_a_copy(backend):
    for dtype in (torch.float32, torch.float64):
        case = make("kl_weights", dtype=dtype)
        weights = case.args[6]
        used = run(case)[2]
        assert used.equal(weights)
        assert used.data_ptr() != weights.data_ptr()


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_mixed_dtypes_are_promoted_and_results_stay_the_students(
    unit, calls, student, teacher, kernel
):
    x, w, weights = unit(6, 4).to(student).requires_grad_(), unit(5, 4).to(student), unit(6, 2)
    u, v = unit(6, 3).to(teacher), unit(5, 3).to(teacher)
    teachers = [(u, v, 7.0), (x.detach(), w, 8.0)]
    options = 2.0, True, weights, UNIFORM, None, None, "mean"
    out = ops.teacher_kl.loss((x, w, 5.0), teachers, *options)
    args = calls[0][1]
    assert {t.dtype for t in (*args[:2], *args[3], *args[4])} == {kernel}
    assert all(o.dtype == wide(student) for o in out)
    exact = [(a.detach().double(), b.double(), s) for a, b, s in ((x, w, 5.0), *teachers)]
    want = ops.teacher_kl.loss(exact[0], exact[1:], *options)
    torch.testing.assert_close(out[0].double(), want[0], rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(out[0], x)[0].dtype == student


def test_the_discrepancy_gate_becomes_weights_that_are_constants(unit, calls):
    x, w = unit(6, 4).float().requires_grad_(), unit(5, 4).float()
    u, v = unit(6, 4).float(), unit(6, 4).float()
    teachers = [(u, w, 7.0), (v, w, 8.0)]
    weighting = Weighting.of("discrepancy")
    loss, kl, used, _ = ops.teacher_kl.loss(
        (x, w, 5.0), teachers, 2.0, True, None, weighting, None, None, "mean"
    )
    given = calls[0][1][6]
    assert given.equal(discrepancy_weights(teachers)) and not given.requires_grad
    assert used.equal(given)
    torch.testing.assert_close(loss, (given * kl).sum(dim=1).mean())


def test_weights_are_differentiable_in_any_floating_dtype(unit):
    x, w = unit(6, 4).float(), unit(5, 4).float()
    teachers = [(unit(6, 3).float(), unit(5, 3).float(), 7.0)]
    for dtype in (torch.float64, torch.float16):
        weights = torch.rand(6, 1).to(dtype).requires_grad_()
        for reduction in ("none", "sum", "mean"):
            options = 2.0, True, weights, UNIFORM, None, None, reduction
            loss, kl, *_ = ops.teacher_kl.loss((x, w, 5.0), teachers, *options)
            (grad,) = torch.autograd.grad(loss.sum(), weights)
            assert grad.dtype == dtype
            torch.testing.assert_close(grad, (kl / 6 if reduction == "mean" else kl).to(dtype))


def test_a_target_is_not_read_where_weights_are_given(backend):
    case = make("kl_weights", dtype=torch.float32)
    odd = with_argument(case, 7, torch.full((6,), 99))
    assert run(odd)[0].equal(run(case)[0])
