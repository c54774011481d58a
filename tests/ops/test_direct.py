"""The shortest way to the C++ kernels: when it is taken, and that it changes no result."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mulki import ops
from mulki.ops import backends, direct
from mulki.ops.operators import OPERATORS
from tests.ops.op_cases import (
    LOSSES,
    Case,
    arguments,
    asking,
    make,
    requiring_grad,
    run,
    with_argument,
)

pytestmark = pytest.mark.parametrize("backend", ["cpp"], indirect=True)


def call(case: Case, reduction: str = "mean") -> tuple[Tensor, ...]:
    """The case by `direct.call`."""
    return direct.call(case.op, arguments(case), reduction)


def is_direct(case: Case) -> bool:
    """Whether `direct.call` takes the short way for a case."""
    x = arguments(case)
    kernel = backends.kernel(case.op, "cpu", x[0].dtype)
    return direct._may_be_direct(x, case.leaves) and isinstance(kernel, backends.CppKernel)


def differentiable(
    name: str, wanted: Sequence[bool] | None = None, dtype: torch.dtype = torch.float32
) -> Case:
    return requiring_grad(make(name, dtype=dtype), wanted)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_taken_by_all_losses_and_gives_the_same(name, reduction, backend):
    case = differentiable(name)
    assert is_direct(case)
    leaves = case.args[: case.leaves]
    whole = asking(case, "rows" if reduction == "none" else "reduced", mean=reduction == "mean")
    for factor in (1.0, 2.5):
        outputs = [call(case, reduction), run(whole)]
        for got, want in zip(*outputs, strict=True):
            assert torch.equal(got, want)
        assert not any(out.requires_grad for out in outputs[0][1:])
        gradients = [torch.autograd.grad(factor * out[0].sum(), leaves) for out in outputs]
        for got, want in zip(*gradients, strict=True):
            assert torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_leaves(dtype, reduction, backend):
    case = differentiable("kl", dtype=dtype)
    gradients = torch.autograd.grad(3 * call(case, reduction)[0].sum(), case.args[:3])
    assert [g.dtype for g in gradients] == [dtype, dtype, torch.float32]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_kept_graph_gives_the_same_gradients_again(reduction, backend):
    case = differentiable("kl_label")
    loss = call(case, reduction)[0].sum()
    first = torch.autograd.grad(loss, case.args[:3], retain_graph=True)
    for gradient in first:
        gradient.add_(1)
    for got, want in zip(torch.autograd.grad(loss, case.args[:3]), first, strict=True):
        torch.testing.assert_close(got, want - 1)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, case.args[:3])


def test_what_is_overwritten_before_the_backward_pass_is_noticed(backend):
    case = differentiable("kl_label")
    loss = call(case, "none")[0].sum()
    case.args[3][1].add_(1)  # a teacher's features
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["similarity", *LOSSES])
@pytest.mark.parametrize("factors", [(1.0, 2.0), (1.0, 1.0)])
def test_a_batch_of_upstream_gradients(name, factors, backend):
    case = differentiable(name)
    leaves = case.args[: case.leaves]
    assert is_direct(case)
    out = call(case, "mean" if name in LOSSES else "none")[0]
    one = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    batch = torch.stack([torch.full_like(out, factor) for factor in factors])
    many = torch.autograd.grad(out, leaves, batch, is_grads_batched=True)
    for gradient, got in zip(one, many, strict=True):
        torch.testing.assert_close(got, torch.stack([factor * gradient for factor in factors]))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_gradient_has_none_of_its_own(reduction, backend):
    case = differentiable("ce")
    loss = call(case, reduction)[0].sum()
    gradients = torch.autograd.grad(loss, case.args[:3], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradients[0].sum().backward()


class Modes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_what_it_is_not_taken_for(backend):
    case = differentiable("ce")
    with Modes():
        assert not is_direct(case)
    seen = []
    torch.func.vmap(lambda x: seen.append(is_direct(case)) or x)(torch.zeros(2))
    assert seen == [False]
    x, *rest = case.args
    assert not is_direct(Case(case.op, (x.as_subclass(Subclass), *rest)))
    assert not is_direct(Case(case.op, (x.to("meta"), *rest)))
    assert not is_direct(Case(case.op, (torch._neg_view(x.detach()), *rest)))
    # Given weights have their gradient in Python.
    weighted = differentiable("kl_weights")
    assert is_direct(weighted)
    weighted.args[6].requires_grad_()
    assert not is_direct(weighted)
    with torch.no_grad():
        assert is_direct(weighted)


def test_another_backend_is_asked_where_it_is_forced(backend):
    case = differentiable("ce")
    assert is_direct(case)
    with ops.use_backend("reference"):
        assert not is_direct(case)


def test_the_checks_of_python_explain(backend):
    case = make("kl_label", dtype=torch.float32)
    bad = with_argument(case, 7, case.args[7] + 9)
    with pytest.raises(ValueError, match="^target: got"):
        call(bad)
    with (
        patch.dict(OPERATORS, {bad.op: OPERATORS[bad.op]._replace(check=lambda *args: None)}),
        pytest.raises(ValueError, match=r"target: got \d+ in row"),
    ):
        call(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_similarity_has_the_same_gradients(dtype, normalize, backend):
    case = with_argument(differentiable("similarity", dtype=dtype), 3, normalize)
    assert is_direct(case)
    results = [call(case, "none")[0], run(case)[0]]
    assert torch.equal(*results)
    upstream = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(z, case.args[:3], upstream) for z in results]
    for got, want, leaf in zip(*gradients, case.args[:3], strict=True):
        assert torch.equal(got, want) and got.dtype == leaf.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
def test_a_backward_pass_under_autocast_gives_the_same(dtype, rounded, backend):
    case = differentiable("similarity", dtype=dtype)
    z = call(case, "none")[0]
    upstream = torch.randn_like(z)
    want = torch.autograd.grad(z, case.args[:3], upstream, retain_graph=True)
    with torch.autocast("cpu", dtype=rounded):
        got = torch.autograd.grad(z, case.args[:3], upstream)
    assert all(map(torch.equal, got, want))


def test_inference_tensors_are_kept(backend):
    case = make("similarity", dtype=torch.float32)
    x, w, *rest = case.args
    with torch.inference_mode():
        frozen = w.clone()
    x.requires_grad_()
    gradients = []
    for prototypes in (w, frozen):
        matrix = call(Case(case.op, (x, prototypes, *rest)), "none")[0]
        gradients += torch.autograd.grad(matrix.square().sum(), x)
    assert torch.equal(*gradients)
    # A copy is kept: a buffer may have the next batch by then.
    matrix = call(Case(case.op, (x, frozen, *rest)), "none")[0]
    with torch.inference_mode():
        frozen.zero_()
    (late,) = torch.autograd.grad(matrix.square().sum(), x)
    assert torch.equal(late, gradients[0])
