"""What autograd may do with the operators, and what it may not."""

from __future__ import annotations

import itertools

import pytest
import torch

from mulki import ops
from mulki.ops import autograd, torch_private
from mulki.ops.gates import Weighting
from tests.ops.op_cases import (
    LOSSES,
    NAMES,
    Case,
    Operations,
    asking,
    count,
    expected,
    make,
    requiring_grad,
    run,
    specification,
    upstream,
)

REDUCTIONS = ("none", "sum", "mean")
UNIFORM = ops.gates.find_gate("uniform")
FORMS = [*((name, "rows") for name in NAMES), *((name, "reduced") for name in LOSSES)]


def loss_of(case: Case, reduction: str) -> torch.Tensor:
    """The case through the function of `mulki.ops`, which chooses the form."""
    operands, rest = case.args[:3], case.args[3:]
    if case.op == "prototype_cross_entropy":
        return ops.prototype_cross_entropy.loss(operands, *rest, reduction)
    if case.op == "teacher_kl":
        tx, tw, ts, weights, target, mask, temperature, gate_temperature, a, b, t2 = rest
        teachers = list(zip(tx, tw, ts, strict=True))
        weighting = Weighting(UNIFORM, gate_temperature, a, b)
        options = temperature, t2, weights, weighting, target, mask
        return ops.teacher_kl.loss(operands, teachers, *options, reduction)[0]
    if case.op == "pair_kl":
        tx, tw, ts, weights, temperature, gate_temperature, a, b, t2, *of_losses = rest
        teachers = list(zip(tx, tw, ts, strict=True))
        options = temperature, t2, weights, Weighting(UNIFORM, gate_temperature, a, b)
        return ops.pair_kl.loss(operands, teachers, *options, reduction, *of_losses)[0]
    if case.op == "contrastive":
        return ops.contrastive.loss(operands, None, reduction)
    bias, offset = rest
    return ops.siglip.loss(operands, bias, reduction, offset)


def differentiable(name: str, form: str, dtype=torch.float32, wanted=None) -> tuple[Case, list]:
    """A case on leaves of its own, and those that require grad."""
    case = requiring_grad(make(name, dtype=dtype), wanted)
    leaves = [leaf for leaf in case.args[: case.leaves] if leaf.requires_grad]
    if form == "reduced":
        wanted = [leaf.requires_grad for leaf in case.args[: case.leaves]]
        case = asking(case, "reduced", wanted)
    return case, leaves


def test_an_upstream_gradient_is_not_rounded_to_a_stored_dtype():
    stored, grad = torch.linspace(1, 2, 300).bfloat16().view(3, 100), torch.tensor(0.7003)
    wanted = (stored.float() * grad).bfloat16()
    assert torch.equal(autograd._times(grad, stored, stored, torch.zeros(())), wanted)
    assert not torch.equal(stored * grad.bfloat16(), wanted)
    with torch.enable_grad():
        assert torch.equal(autograd._times(grad, stored, stored, None), wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_any_upstream_gradient_reaches_the_operands(name, reduction):
    case = requiring_grad(make(name))
    loss = loss_of(case, reduction)
    # Not 1 for a loss among others, under a gradient scaler or for rows with weights of their own.
    grad = upstream(case) if reduction == "none" else torch.tensor(-3.7, dtype=torch.float64)
    twin = requiring_grad(case)
    rows = specification(twin)
    want = rows if reduction == "none" else rows.sum() / (count(case) if reduction == "mean" else 1)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, case.args[: case.leaves], grad)
    for a, b in zip(got, torch.autograd.grad(want, twin.args[: case.leaves], grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_second_backward_gives_the_same_bits(name, form, backend):
    case, leaves = differentiable(name, form, torch.bfloat16)
    out = run(case)[0]
    grad = torch.full_like(out, 0.3)
    kept = grad.clone()
    one = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    two = torch.autograd.grad(out, leaves, grad)
    assert all(a.equal(b) for a, b in zip(one, two, strict=True))
    assert grad.equal(kept) and grad._version == 0
    for leaf, gradient in zip(leaves, one, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("name", LOSSES)
def test_backward_again_and_again(name, backend):
    """Gradients that a leaf accumulates in place are not those that the graph keeps."""
    case, leaves = differentiable(name, "reduced", torch.float32)
    out = run(case)[0]
    one = [g.clone() for g in torch.autograd.grad(out, leaves, retain_graph=True)]
    for times in (1, 2, 3):
        out.backward(retain_graph=times < 3)
        for leaf, g in zip(leaves, one, strict=True):
            torch.testing.assert_close(leaf.grad, times * g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_upstream_gradients(name, dtype, backend):
    case, leaves = differentiable(name, "reduced", dtype)
    out = run(case)[0]
    one = torch.autograd.grad(out, leaves, retain_graph=True)
    many = torch.autograd.grad(out, leaves, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    for g, batch in zip(one, many, strict=True):
        torch.testing.assert_close(batch, torch.stack([g, 2 * g]))


@pytest.mark.skipif(torch_private.reason() is not None, reason="needs torch's private names")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["ce_all", "kl_label", "pairs", "contrastive", "siglip"])
def test_an_upstream_gradient_is_one_multiplication_for_each_leaf(name, dtype):
    """Into the dtype of the leaf: without a copy in that of the stored gradient."""
    case, leaves = differentiable(name, "reduced", dtype)
    out = run(case)[0]
    grad = torch.tensor(3.0, dtype=out.dtype)
    with Operations() as operations:
        gradients = torch.autograd.grad(out, leaves, grad)
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    assert [name for name in operations.names if name not in ("empty_like", "detach")] == (
        ["mul"] * len(leaves)
    )


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_frozen_operands_have_no_gradient_and_cost_none(name, form, calls):
    """`wanted` reaches the kernel: it is what saves two of five products for a frozen text side."""
    everything = expected(make(name), None if form == "rows" else True)[1]
    for wanted in itertools.product([False, True], repeat=make(name).leaves):
        if not any(wanted):
            continue
        calls.clear()
        case, leaves = differentiable(name, form, torch.float64, wanted)
        out = run(case)[0]
        gradients = torch.autograd.grad(out, leaves, upstream(case) if form == "rows" else None)
        asked = [tuple(r.wanted) for *_, r in calls if form == "reduced" or r.grad is not None]
        assert asked == [wanted]
        kept = [g for g, w in zip(everything, wanted, strict=True) if w]
        for a, b in zip(gradients, kept, strict=True):
            torch.testing.assert_close(a, b)


def test_a_frozen_leaf_keeps_no_gradient(backend):
    for name in LOSSES:
        for reduction in REDUCTIONS:
            wanted = [True, False, False, False][: make(name).leaves]
            case = requiring_grad(make(name, dtype=torch.float32), wanted)
            loss_of(case, reduction).sum().backward()
            assert case.args[0].grad is not None
            assert all(leaf.grad is None for leaf in case.args[1 : case.leaves])


def test_a_gradient_that_was_not_asked_for_is_an_error(backend):
    case = requiring_grad(make("ce", dtype=torch.float32))
    loss = run(asking(case, "reduced", [True, False, True]))[0]
    with pytest.raises(RuntimeError, match=r"^wanted\[1\]: got False"):
        loss.backward()


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_double_backward_raises(name, form, backend):
    case, leaves = differentiable(name, form)
    out = run(case)[0]
    for i in range(len(leaves)):
        gradients = torch.autograd.grad(out.sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradients[i].square().sum().backward()
        # By another leaf too, as of a hyper-parameter: zero would be a wrong answer.
        for other in leaves:
            gradients = torch.autograd.grad(out.sum(), leaves, create_graph=True)
            with pytest.raises(RuntimeError, match="double backward"):
                torch.autograd.grad(gradients[i].square().sum(), other, allow_unused=True)


@pytest.mark.parametrize("name", ["kl", "kl_weights", "pairs", "contrastive"])
def test_by_products_are_not_differentiable(name, backend):
    for form in ("rows", "reduced"):
        case, _ = differentiable(name, form)
        loss, *rest = run(case)
        assert loss.requires_grad
        assert not any(out.requires_grad for out in rest)


def test_a_loss_is_one_call_whatever_its_reduction(calls):
    for grad, reduction in itertools.product([True, False], REDUCTIONS):
        for name in LOSSES:
            with torch.set_grad_enabled(grad):
                calls.clear()
                case = requiring_grad(make(name))
                loss_of(case, reduction)
                assert [op for op, *_ in calls] == [case.op]


def test_losses_agree(backend):
    """With and without gradients a mean is the same number but for rounding."""
    for name in LOSSES:
        case = requiring_grad(make(name, dtype=torch.float32))
        for reduction in ("sum", "mean"):
            with torch.no_grad():
                rows = loss_of(case, reduction)
            torch.testing.assert_close(loss_of(case, reduction), rows, rtol=2e-6, atol=1e-6)


def test_gradients_flow_through_a_scale_of_another_dtype_and_accumulate(unit):
    x, w = unit(6, 4).float(), unit(5, 4).float()
    log_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        operands, target = (x, w, log_scale.exp()), torch.zeros(6).long()
        ops.prototype_cross_entropy.loss(operands, target, None, 0.0, -100, "mean").backward()
    twin = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    logits = twin.exp() * (x.double() @ w.double().T)
    torch.nn.functional.cross_entropy(logits, torch.zeros(6).long()).backward()
    torch.testing.assert_close(log_scale.grad, 2 * twin.grad, rtol=1e-5, atol=1e-7)


def test_a_loss_scaler_acts_before_the_gradient_is_rounded_to_half_precision(backend):
    case = make("kl", n=64, p=100, d=16, dtype=torch.float16, scale=1.0, gap=1e-3)
    truth = expected(case, True)[1][0]
    assert truth.abs().max() < torch.finfo(torch.float16).tiny
    case = requiring_grad(case, [True, False, False])
    factor = 2.0**20
    (loss_of(case, "mean") * factor).backward()
    error = case.args[0].grad.double() / factor - truth
    assert error.norm() < 1e-2 * truth.norm()


def test_forward_mode_is_refused(unit):
    x, w = unit(6, 4), unit(6, 4)
    for loss in (
        lambda x: ops.contrastive.loss((x, w, 9.0), None, "mean"),
        lambda x: ops.similarity.matrix((x, w, 9.0)),
        lambda x: ops.siglip.loss((w, w, 9.0), x[0, 0], "mean"),
        lambda x: kl_of_teacher(w, (x, w, 9.0)),
        lambda x: kl_of_teacher(w, (w, x, 9.0)),
        lambda x: kl_of_teacher(w, (w, w, x[0, 0])),
    ):
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(loss, (x,), (w,))
    if torch_private.reason() is None:
        compiled = torch.compile(torch.func.jvp, backend="eager")
        with pytest.raises(RuntimeError, match="forward-mode"):
            compiled(loss_of_pairs, (x,), (w,))


def kl_of_teacher(x: torch.Tensor, teacher: tuple) -> torch.Tensor:
    options = 1.0, True, None, Weighting(UNIFORM), None, None, "mean"
    return ops.teacher_kl.loss((x, x, 9.0), [teacher], *options)[0]


def test_transforms_that_differentiate_are_refused(unit):
    x, w = unit(6, 4), unit(6, 4)
    for loss in (
        lambda x: ops.contrastive.loss((x, w, 9.0), None, "mean"),
        lambda x: ops.contrastive.loss((x, w, 9.0), None, "none").sum(),
        lambda x: kl_of_teacher(x, (w, w, 9.0)),
        lambda x: ops.similarity.matrix((x, w, 9.0)).sum(),
    ):
        for transform in (torch.func.grad(loss), torch.func.jacrev(loss)):
            with pytest.raises(RuntimeError, match=r"use torch\.autograd\.grad"):
                transform(x)
        with pytest.raises(RuntimeError, match=r"use torch\.autograd\.grad"):
            torch.func.vjp(loss, x)
        # A transform between the two hides from the loss that it is differentiated.
        mapped = torch.func.vmap(loss)
        with pytest.raises(RuntimeError, match=r"use torch\.autograd\.grad"):
            torch.func.grad(lambda xs, mapped=mapped: mapped(xs).sum())(torch.stack([x, x]))


def test_a_loss_of_constants_may_stand_inside_a_transform(unit):
    x, w = unit(6, 4).float(), unit(6, 4).float()

    def loss(q):
        return q.sum() + ops.contrastive.loss((x * 1, w, 9.0), None, "mean").detach()

    assert torch.func.grad(loss)(torch.ones(3)).equal(torch.ones(3))


def test_inference_tensors_may_stand_beside_leaves(backend):
    """Frozen prototypes and teachers may come from `torch.inference_mode`."""
    for name in LOSSES:
        case = make(name, dtype=torch.float32)
        with torch.inference_mode():
            frozen = [_cloned(value) for value in case.args[1:]]
        for reduction in REDUCTIONS:
            gradients = []
            for rest in (case.args[1:], frozen):
                x = case.args[0].clone().requires_grad_()
                loss_of(Case(case.op, (x, *rest)), reduction).sum().backward()
                gradients.append(x.grad)
            assert gradients[0].equal(gradients[1])


def _cloned(value: object) -> object:
    if isinstance(value, list):
        return [_cloned(v) for v in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def loss_of_pairs(x: torch.Tensor) -> torch.Tensor:
    return ops.contrastive.loss((x, x.detach(), 9.0), None, "mean")


@pytest.mark.skipif(torch_private.reason() is not None, reason="needs torch's private names")
def test_gradients_flow_through_vmap_of_a_mean(unit):
    xs = torch.stack([unit(6, 4), unit(6, 4)]).requires_grad_()
    mapped = torch.autograd.grad(torch.vmap(loss_of_pairs)(xs).sum(), xs)
    one_by_one = torch.autograd.grad(sum(loss_of_pairs(x) for x in xs), xs)
    torch.testing.assert_close(mapped, one_by_one)


@pytest.mark.skipif(torch_private.reason() is not None, reason="needs torch's private names")
def test_gradients_flow_through_compiled_vmap_of_a_mean(unit):
    xs = torch.stack([unit(6, 4), unit(6, 4)]).requires_grad_()

    def mapped(rows):
        return torch.vmap(loss_of_pairs)(rows).sum()

    compiled = torch.compile(mapped, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(xs), xs) for f in (compiled, mapped)))


def test_vmap_loops_over_an_operator_without_lists(unit):
    x, w = torch.stack([unit(6, 4), unit(6, 4)]), unit(5, 4)
    got = torch.vmap(lambda v: ops.similarity.matrix((v, w, 9.0)))(x)
    torch.testing.assert_close(got, 9 * x @ w.T)
    with pytest.raises(RuntimeError):
        torch.vmap(lambda v: kl_of_teacher(v, (v, v, 9.0)))(x)
