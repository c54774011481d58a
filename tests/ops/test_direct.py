"""The shortest way to the C++ kernels: when it is taken, and that it changes no result."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mulki import ops
from mulki.ops import direct
from mulki.ops.operators import DIFFERENTIABLE, OPERATORS
from tests.ops.op_cases import (
    ALL,
    LOSSES,
    Case,
    first,
    form_arguments,
    make,
    requiring_grad,
    run,
)

pytestmark = pytest.mark.parametrize("backend", ["cpp"], indirect=True)


def is_direct(case: Case) -> bool:
    """Whether `direct.call` takes the short way for a case."""
    kernel = direct._cpp_kernel(case.op, case.args[0].dtype)
    return direct._may_be_direct(case.op, case.args) and kernel is not None


def reduced(name: str, wanted: list[bool] | None = None) -> Case:
    case = make(name, dtype=torch.float32)
    wanted = [True] * case.leaves if wanted is None else wanted
    return form_arguments(requiring_grad(case, wanted), "reduced", wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_taken_by_all_reduced_forms_and_gives_the_same(name, backend):
    case = reduced(name)
    assert case.op in DIFFERENTIABLE and is_direct(case)
    leaves = case.args[: make(name).leaves]
    for factor in (1.0, 2.5):
        outputs = [direct.call(case.op, *case.args), run(case)]
        for got, want in zip(*outputs, strict=True):
            assert torch.equal(got, want)
        assert not any(out.requires_grad for out in outputs[0][1:])
        gradients = [torch.autograd.grad(factor * out[0], leaves) for out in outputs]
        for got, want in zip(*gradients, strict=True):
            assert torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_leaves(dtype, backend):
    case = requiring_grad(make("kl", dtype=dtype))
    case = form_arguments(case, "reduced", ALL)
    leaves = case.args[:3]
    for out in (direct.call(case.op, *case.args), run(case)):
        gradients = torch.autograd.grad(3 * out[0], leaves)
        assert [g.dtype for g in gradients] == [dtype, dtype, torch.float32]


def test_a_kept_graph_gives_the_same_gradients_again(backend):
    case = reduced("ce")
    loss = direct.call(case.op, *case.args)[0]
    first = torch.autograd.grad(loss, case.args[:3], retain_graph=True)
    for gradient in first:
        gradient.add_(1)
    for got, want in zip(torch.autograd.grad(loss, case.args[:3]), first, strict=True):
        torch.testing.assert_close(got, want - 1)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, case.args[:3])


@pytest.mark.parametrize("name", ["similarity", *LOSSES])
@pytest.mark.parametrize("factors", [(1.0, 2.0), (1.0, 1.0)])
def test_a_batch_of_upstream_gradients(name, factors, backend):
    case = requiring_grad(make(name, dtype=torch.float32))
    leaves = case.args[: case.leaves]
    if name in LOSSES:
        case = form_arguments(case, "reduced", [True] * case.leaves)
    assert is_direct(case)
    out = first(direct.call(case.op, *case.args))
    one = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    batch = torch.stack([torch.full_like(out, factor) for factor in factors])
    many = torch.autograd.grad(out, leaves, batch, is_grads_batched=True)
    for gradient, got in zip(one, many, strict=True):
        torch.testing.assert_close(got, torch.stack([factor * gradient for factor in factors]))


def test_a_gradient_that_was_not_asked_for_is_an_error(backend):
    case = requiring_grad(make("ce", dtype=torch.float32))
    for i in range(3):
        wanted = [j != i for j in range(3)]
        bad = form_arguments(case, "reduced", wanted)
        loss = direct.call(bad.op, *bad.args)[0]
        with pytest.raises(RuntimeError, match=rf"^wanted\[{i}\]: got False"):
            loss.backward()


def test_a_gradient_has_none_of_its_own(backend):
    case = reduced("ce")
    loss = direct.call(case.op, *case.args)[0]
    gradients = torch.autograd.grad(loss, case.args[:3], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward of .* is not supported"):
        gradients[0].sum().backward()


def test_only_wanted_gradients_are_set(backend):
    case = reduced("contrastive", [True, False, False])
    direct.call(case.op, *case.args)[0].backward()
    image, text, scale = case.args[:3]
    assert image.grad is not None and text.grad is None and scale.grad is None


class Modes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_what_it_is_not_taken_for(backend):
    case = reduced("ce")
    with Modes():
        assert not is_direct(case)
    seen = []
    torch.func.vmap(lambda x: seen.append(is_direct(case)) or x)(torch.zeros(2))
    assert seen == [False]
    x, *rest = case.args
    assert not is_direct(Case(case.op, (x.as_subclass(Subclass), *rest)))
    assert not is_direct(Case(case.op, (x.to("meta"), *rest)))
    # Rows have their gradients in Python, and so have given weights.
    rows = requiring_grad(make("ce", dtype=torch.float32))
    assert not is_direct(rows)
    with torch.no_grad():
        assert is_direct(rows)
    weighted = reduced("kl_weights")
    assert is_direct(weighted)
    weighted.args[6].requires_grad_()
    assert not is_direct(weighted)


def test_another_backend_is_asked_where_it_is_forced(backend):
    case = reduced("ce")
    assert is_direct(case)
    with ops.use_backend("reference"):
        assert not is_direct(case)


def test_the_checks_of_python_explain(backend):
    case = make("kl_label", dtype=torch.float32)
    bad = Case(case.op, (*case.args[:7], case.args[7] + 9, *case.args[8:]))
    with pytest.raises(ValueError, match="^target: got"):
        direct.call(bad.op, *bad.args)
    with (
        patch.dict(OPERATORS, {bad.op: OPERATORS[bad.op]._replace(check=lambda *args: None)}),
        pytest.raises(ValueError, match=r"target: got \d+ in row"),
    ):
        direct.call(bad.op, *bad.args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_similarity_has_the_same_gradients(dtype, normalize, backend):
    case = requiring_grad(make("similarity", dtype=dtype))
    x, w, scale, _ = case.args
    args = x, w, scale, normalize
    assert is_direct(Case(case.op, args))
    results = [direct.call(case.op, *args), torch.ops.mulki.similarity(*args)]
    assert torch.equal(*results)
    upstream = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(z, args[:3], upstream) for z in results]
    for got, want, leaf in zip(*gradients, args[:3], strict=True):
        assert torch.equal(got, want) and got.dtype == leaf.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
def test_a_backward_pass_under_autocast_gives_the_same(dtype, rounded, backend):
    case = requiring_grad(make("similarity", dtype=dtype))
    z = direct.call(case.op, *case.args)
    upstream = torch.randn_like(z)
    want = torch.autograd.grad(z, case.args[:3], upstream, retain_graph=True)
    with torch.autocast("cpu", dtype=rounded):
        got = torch.autograd.grad(z, case.args[:3], upstream)
    assert all(map(torch.equal, got, want))


def test_similarity_keeps_inference_tensors(backend):
    case = make("similarity", dtype=torch.float32)
    x, w, scale, normalize = case.args
    with torch.inference_mode():
        frozen = w.clone()
    x.requires_grad_()
    for prototypes in (w, frozen):
        direct.call(case.op, x, prototypes, scale, normalize).square().sum().backward()
    once = x.grad / 2
    x.grad = None
    direct.call(case.op, x, frozen, scale, normalize).square().sum().backward()
    assert torch.equal(x.grad, once)
    assert w.grad is None and frozen.grad is None


def test_a_gradient_of_similarity_has_none_of_its_own(backend):
    case = requiring_grad(make("similarity", dtype=torch.float32))
    z = direct.call(case.op, *case.args)
    (gradient,) = torch.autograd.grad(z.sum(), case.args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward of mulki::similarity is not supported"):
        gradient.sum().backward()
