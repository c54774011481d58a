"""The reference's own gradients are those of autograd, exactly: in float64, form by form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from mulki.ops.operators import OPERATORS
from tests.ops import op_cases
from tests.ops.op_cases import LOSSES, NAMES, Case, expected, first, form_arguments, make, run


def split(case: Case, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The gradients at the end of an output."""
    return output[-case.leaves :]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_specification(name):
    case = make(name)
    torch.testing.assert_close(first(run(case)), expected(case)[0])


@pytest.mark.parametrize(
    ("name", "form"), [*((n, "backward") for n in NAMES), *((n, "reduced") for n in LOSSES)]
)
def test_gradients_are_those_of_autograd_for_any_choice_of_them(name, form):
    case = make(name)
    _, gradients = expected(case, None if form == "backward" else True)
    for wanted in itertools.product([False, True], repeat=case.leaves):
        output = run(form_arguments(case, form, wanted))
        for got, want, asked in zip(split(case, output), gradients, wanted, strict=True):
            assert got.dtype == torch.float64
            if asked:
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
            else:
                assert got.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "form"), [*((n, "backward") for n in NAMES), *((n, "reduced") for n in LOSSES)]
)
def test_a_gradient_is_the_same_whatever_else_is_wanted(name, form, dtype, backend):
    case = make(name, n=37, p=53, d=24, dtype=dtype)
    everything = run(form_arguments(case, form, [True] * case.leaves))
    details = len(everything) - case.leaves
    for wanted in itertools.product([False, True], repeat=case.leaves):
        output = run(form_arguments(case, form, wanted))
        for got, want, asked in zip(output, everything, (*[True] * details, *wanted), strict=True):
            assert got.equal(want) if asked else got.shape == (0,)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_reduced_is_the_sum_or_the_mean_and_its_gradient(name, mean):
    case = make(name)
    total, gradients = expected(case, mean)
    output = run(form_arguments(case, "reduced", [True] * case.leaves, mean))
    torch.testing.assert_close(output[0], total)
    for got, want in zip(split(case, output), gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    case = op_cases.requiring_grad(make(name, n=3, p=4, d=2))
    leaves, rest = case.args[: case.leaves], case.args[case.leaves :]
    assert gradcheck(lambda *o: first(run(Case(case.op, (*o, *rest)))), leaves)
    if name in LOSSES:
        wanted = [True] * case.leaves
        assert gradcheck(
            lambda *o: run(form_arguments(Case(case.op, (*o, *rest)), "reduced", wanted))[0],
            leaves,
        )


@pytest.mark.parametrize("reduced", [False, True])
def test_gradcheck_of_given_weights(reduced):
    case = make("kl_weights", n=3, p=4, d=2)
    weights = case.args[6].requires_grad_()

    def loss(weights):
        given = Case(case.op, (*case.args[:6], weights, *case.args[7:]))
        if reduced:
            given = form_arguments(given, "reduced", [False] * 3)
        return first(run(given))

    assert gradcheck(loss, [weights])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_results_are_wide_and_row_gradients_in_the_dtype_of_their_operand(name, dtype, backend):
    case = make(name, dtype=dtype)
    rows = run(case)
    wide = dtype if case.op == "similarity" else torch.float32
    for out in rows if isinstance(rows, tuple) else (rows,):
        assert out.dtype == wide
    wanted = [True] * case.leaves
    narrow = split(case, run(form_arguments(case, "backward", wanted)))
    assert [g.dtype for g in narrow] == [dtype, dtype, *[torch.float32] * (case.leaves - 2)]
    assert [g.shape for g in narrow] == [t.shape for t in case.args[: case.leaves]]
    if name in LOSSES:
        # Not rounded to half precision: a loss scaler acts first.
        for out in run(form_arguments(case, "reduced", wanted)):
            assert out.dtype == torch.float32


def test_a_row_of_zeros_has_a_gradient_when_normalised():
    case = make("cosines")
    case.args[0][1] = 0
    _, gradients = expected(case)
    got = run(form_arguments(case, "backward", [True] * 3))
    for a, b in zip(got, gradients, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [*LOSSES, "similarity", "cosines"])
def test_no_rows(name, backend):
    case = make(name, n=0, dtype=torch.float32)
    assert first(run(case)).shape[0] == 0
    wanted = [True] * case.leaves
    for form in ("backward", "reduced") if name in LOSSES else ("backward",):
        output = run(form_arguments(case, form, wanted))
        for got, leaf in zip(split(case, output), case.args, strict=False):
            assert got.shape == leaf.shape
            assert got.eq(0).all()
    if name in LOSSES:
        assert run(form_arguments(case, "reduced", wanted, mean=False))[0] == 0
        assert run(form_arguments(case, "reduced", wanted, mean=True))[0].isnan()


@pytest.mark.parametrize("name", ["ce", "kl", "kl_weights", "contrastive"])
def test_one_class_costs_nothing(name, backend):
    case = make(name, n=1 if name == "contrastive" else 6, p=1, dtype=torch.float32)
    output = run(form_arguments(case, "reduced", [True] * 3))
    torch.testing.assert_close(output[0], torch.zeros(()), atol=1e-6, rtol=0)
    for gradient in split(case, output):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_rows_ignored(dtype, backend):
    case = make("ce_all", dtype=dtype)
    case.args[3].fill_(-100)
    assert run(case).eq(0).all()
    for mean in (False, True):
        total, *gradients = run(form_arguments(case, "reduced", [True] * 3, mean))
        assert total.isnan() if mean else total == 0
        for gradient in gradients:
            assert gradient.eq(0).all()


def test_the_weights_that_come_back_are_a_copy(backend):
    for dtype in (torch.float32, torch.float64):
        case = make("kl_weights", dtype=dtype)
        weights = case.args[6]
        used = run(case)[2]
        assert used.equal(weights)
        assert used.data_ptr() != weights.data_ptr()


def test_every_form_of_every_operator_is_there():
    assert {op.removesuffix("_backward").removesuffix("_reduced") for op in OPERATORS} == {
        make(name).op for name in NAMES
    }
