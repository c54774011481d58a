"""The reference's own gradients are those of autograd, exactly, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from mulki import ops
from mulki.ops import torch_private
from mulki.ops.operators import OPERATORS
from tests.ops import op_cases
from tests.ops.op_cases import LOSSES, NAMES, Case, asking, expected, make, requiring_grad, run


def split(case: Case, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The gradients at the end of an output."""
    return output[-case.leaves :]


@pytest.mark.parametrize(
    ("name", "form"), [*((n, "backward") for n in NAMES), *((n, "reduced") for n in LOSSES)]
)
def test_gradients_are_those_of_autograd_for_any_choice_of_them(name, form):
    case = make(name)
    _, gradients = expected(case, None if form == "backward" else True)
    for wanted in itertools.product([False, True], repeat=case.leaves):
        output = run(asking(case, form, wanted))
        for got, want, asked in zip(split(case, output), gradients, wanted, strict=True):
            assert got.dtype == torch.float64
            if asked:
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
            else:
                assert got.shape == (0,)


@pytest.mark.parametrize(("name", "factor"), [("kl_weights", 1.0), ("pairs_weights", 0.5)])
def test_the_specification_differentiates_by_given_weights(name, factor):
    case = make(name)
    operator = OPERATORS[case.op]
    x = operator.arguments(*case.args)
    weights = x.weights.clone().requires_grad_()
    rows, kl, used, _ = operator.reference(x._replace(weights=weights))
    (found,) = torch.autograd.grad(rows.sum(), weights)
    torch.testing.assert_close(found, factor * kl)
    assert not used.requires_grad


def test_a_mean_is_where_its_arguments_are():
    case = asking(make("kl"), "reduced")
    with torch.device("meta"):
        loss, *_ = run(case)
    assert loss.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "form"), [*((n, "backward") for n in NAMES), *((n, "reduced") for n in LOSSES)]
)
def test_a_gradient_is_the_same_whatever_else_is_wanted(name, form, dtype, backend):
    case = make(name, n=37, p=53, d=24, dtype=dtype)
    everything = run(asking(case, form))
    details = len(everything) - case.leaves
    for wanted in itertools.product([False, True], repeat=case.leaves):
        output = run(asking(case, form, wanted))
        for got, want, asked in zip(output, everything, (*[True] * details, *wanted), strict=True):
            assert got.equal(want) if asked else got.shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    case = op_cases.requiring_grad(make(name, n=3, p=4, d=2))
    leaves, rest = case.args[: case.leaves], case.args[case.leaves :]
    assert gradcheck(lambda *o: run(Case(case.op, (*o, *rest)))[0], leaves)
    if name in LOSSES:
        wanted = [True] * case.leaves
        assert gradcheck(
            lambda *o: run(asking(Case(case.op, (*o, *rest)), "reduced", wanted))[0],
            leaves,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_results_are_wide_and_row_gradients_in_the_dtype_of_their_operand(name, dtype, backend):
    case = make(name, dtype=dtype)
    rows = run(case)[: -case.leaves]
    wide = dtype if case.op == "similarity" else torch.float32
    assert all(out.dtype == wide for out in rows)
    wanted = [True] * case.leaves
    narrow = split(case, run(asking(case, "backward", wanted)))
    assert [g.dtype for g in narrow] == [dtype, dtype, *[torch.float32] * (case.leaves - 2)]
    assert [g.shape for g in narrow] == [t.shape for t in case.args[: case.leaves]]
    if name in LOSSES:
        # Not rounded to half precision: a loss scaler acts first.
        for out in run(asking(case, "reduced", wanted)):
            assert out.dtype == torch.float32


@pytest.mark.parametrize("name", [*LOSSES, "similarity", "cosines"])
def test_no_rows(name, backend):
    case = make(name, n=0, dtype=torch.float32)
    assert run(case)[0].shape[0] == 0
    wanted = [True] * case.leaves
    for form in ("backward", "reduced") if name in LOSSES else ("backward",):
        output = run(asking(case, form, wanted))
        for got, leaf in zip(split(case, output), case.args, strict=False):
            assert got.shape == leaf.shape
            assert got.eq(0).all()
    if name in LOSSES:
        assert run(asking(case, "reduced", wanted, mean=False))[0] == 0
        assert run(asking(case, "reduced", wanted, mean=True))[0].isnan()


@pytest.mark.parametrize("name", ["ce", "kl", "kl_weights", "pairs", "contrastive"])
def test_one_class_costs_nothing(name, backend):
    case = make(name, n=1 if name in ("pairs", "contrastive") else 6, p=1, dtype=torch.float32)
    output = run(asking(case, "reduced", [True] * 3))
    torch.testing.assert_close(output[0], torch.zeros(()), atol=1e-6, rtol=0)
    for gradient in split(case, output):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


@pytest.mark.skipif(torch_private.reason() is not None, reason="needs torch's private names")
def test_hooks_of_saved_tensors_see_the_operator_alone(backend):
    """Its own graph, of which a sum or a mean has its gradients, ends inside it."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    x, w, scale = requiring_grad(make("contrastive", dtype=dtype)).args

    def loss(x, w, scale):
        return ops.contrastive.loss((x.tanh(), w, scale), None, "mean")

    want = torch.autograd.grad(loss(x, w, scale), (x, w, scale))
    again = checkpoint(loss, x, w, scale, use_reentrant=False)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        watched = loss(x, w, scale)
    assert (len(x), len(w)) not in sizes
    for one in (again, watched):
        for got, exact in zip(torch.autograd.grad(one, (x, w, scale)), want, strict=True):
            assert got.equal(exact)
