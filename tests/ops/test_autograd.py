"""Autograd of every operator: backward passes again, batched, refused, and what stays behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mulki import Similarity
from mulki.bench.cases import VARIANTS, Inputs, variant
from mulki.bench.losses import MULKI
from mulki.functional import (
    clip_contrastive,
    pair_teacher_kl,
    prototype_cross_entropy,
    prototype_similarity,
    siglip,
    teacher_kl,
)
from mulki.ops import torch_private, use_backend
from tests.ops.conftest import Backend
from tests.ops.oracle import REDUCTIONS, computed, same

NAMES = tuple(VARIANTS)
LOSSES = tuple(name for name in NAMES if VARIANTS[name][0] != "similarity")
needs_private = pytest.mark.skipif(
    torch_private.reason() is not None, reason="needs torch's private names"
)


def called(name: str, reduction: str, backend: Backend, dtype: str = "float32") -> tuple:
    """A loss, and its leaves."""
    case = variant(name, dtype=dtype, device=backend.device)
    inputs = case.inputs()
    asked = {} if case.operator == "similarity" else {"reduction": reduction}
    return inputs.call(MULKI[case.operator], **asked), list(inputs.leaves.values())


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_backward_again_and_again(name: str, reduction: str, backend: Backend) -> None:
    """The same bits each time, though what a leaf accumulates in place is not what is kept."""
    out, leaves = called(name, reduction, backend, "bfloat16")
    grad = torch.full_like(out, 0.3)
    one = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    kept = [g.clone() for g in one]
    for gradient in one:
        gradient.add_(1)
    two = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    assert all(map(torch.equal, kept, two))
    assert grad.eq(0.3).all() or grad.dtype != torch.float32
    for times in (1, 2):
        out.backward(grad, retain_graph=times < 2)
    for leaf, g in zip(leaves, kept, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, 2 * g, rtol=1e-2, atol=1e-4)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("name", LOSSES)
def test_any_upstream_gradient(name: str, backend: Backend) -> None:
    """Not 1 for a loss among others, or under a gradient scaler; and a batch of them."""
    for dtype in ("float32", "bfloat16"):
        out, leaves = called(name, "mean", backend, dtype)
        one = torch.autograd.grad(out, leaves, retain_graph=True)
        scaled = torch.autograd.grad(-3.5 * out, leaves, retain_graph=True)
        rtol = 1e-5 if dtype == "float32" else 1e-2
        for g, other in zip(one, scaled, strict=True):
            torch.testing.assert_close(other, -3.5 * g, rtol=rtol, atol=1e-6)
        if "weights" in name:  # whose gradient is one of rows
            continue
        grads = torch.tensor([1.0, 2.0], device=backend.device)
        for g, batch in zip(
            one, torch.autograd.grad(out, leaves, grads, is_grads_batched=True), strict=True
        ):
            torch.testing.assert_close(batch, torch.stack([g, 2 * g]))


def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `chunked` take several blocks, and so no formula that keeps all logits."""
    monkeypatch.setenv("MULKI_CHUNK_MB", "0.0001")


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_double_backward_raises(
    name: str, reduction: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another leaf too, as of a hyper-parameter: zero would be a wrong answer."""
    in_blocks(monkeypatch)
    if variant(name).operator == "similarity":
        pytest.skip("is plain PyTorch, which differentiates twice")
    out, leaves = called(name, reduction, backend)
    for i, other in itertools.product(range(len(leaves)), leaves):
        gradients = torch.autograd.grad(out.sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradients[i].square().sum(), other, allow_unused=True)


@pytest.mark.parametrize("name", ["ce_all", "kl_label", "kl_weights", "pairs_weights", "siglip"])
def test_frozen_leaves_keep_no_gradient(name: str, backend: Backend) -> None:
    case = variant(name, device=backend.device)
    for reduction in REDUCTIONS:
        inputs = case.inputs()
        features = inputs.leaves["features"]
        frozen = inputs.without([leaf for leaf in inputs.leaves if leaf != "features"])
        frozen.call(MULKI[case.operator], reduction=reduction).sum().backward()
        assert features.grad is not None
        assert all(leaf.grad is None for leaf in inputs.leaves.values() if leaf is not features)


def test_inference_tensors_may_stand_beside_leaves(backend: Backend) -> None:
    """Frozen prototypes and teachers may come from `torch.inference_mode`."""
    for name in NAMES:
        case = variant(name, device=backend.device)
        plain = case.inputs().without(["prototypes", "scale", "bias", "weights"])
        with torch.inference_mode():
            frozen = plain.map(Tensor.clone)
        x = plain.leaves["features"]
        beside = Inputs((x, *frozen.arguments[1:]), {"features": x}, plain.upstream, frozen.options)
        for reduction in REDUCTIONS:
            found, wanted = (computed(case.operator, i, reduction) for i in (beside, plain))
            assert all(found[key].equal(want) for key, want in wanted.items()), name


def test_what_is_overwritten_before_the_backward_pass_is_noticed(backend: Backend) -> None:
    case = variant("kl_label", device=backend.device)
    inputs = case.inputs()
    loss = inputs.call(MULKI[case.operator], reduction="none").sum()
    inputs.arguments[3][1][0].add_(1)  # a teacher's features
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_private
@pytest.mark.parametrize("name", ["contrastive", "kl_label", "ce"])
def test_no_matrix_is_kept_and_a_checkpoint_gives_the_same(
    name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch)
    case = variant(name, 30, 20, 4, device=backend.device)
    inputs = case.inputs()
    x, *rest = inputs.arguments
    leaves = list(inputs.leaves.values())

    def loss(x: Tensor, *rest: Tensor) -> Tensor:
        return MULKI[case.operator](x.tanh(), *rest, **inputs.options)

    want = torch.autograd.grad(loss(x, *rest), leaves)
    again = torch.autograd.grad(checkpoint(loss, x, *rest, use_reentrant=False), leaves)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
    ):
        loss(x, *rest)
    assert max(sizes) < 30 * 20
    assert all(map(torch.equal, again, want))


def test_weights_are_differentiable_in_any_floating_dtype(backend: Backend) -> None:
    case = variant("kl_weights", device=backend.device)
    inputs = case.inputs()
    options = {**inputs.options}
    for dtype, reduction in itertools.product((torch.float64, torch.float16), REDUCTIONS):
        weights = options["weights"].detach().to(dtype).requires_grad_()
        given = options | {"weights": weights, "reduction": reduction, "return_details": True}
        loss, details = MULKI[case.operator](*inputs.arguments, **given)
        (gradient,) = torch.autograd.grad(loss.sum(), weights)
        wanted = details.kl / 6 if reduction == "mean" else details.kl
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, wanted.to(dtype))
        # What comes back is a copy.
        assert details.weights.data_ptr() != weights.data_ptr()


def of_pairs(x: Tensor) -> Tensor:
    return clip_contrastive(x, x.detach(), 9.0)


def distilled(x: Tensor, teacher: Similarity) -> Tensor:
    return teacher_kl(Similarity(x, x.detach(), 9.0), [teacher])


def losses_of(w: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """A loss of each operator by its features."""
    target, fixed = torch.arange(len(w)), Similarity(w, w, 9.0)
    return [
        lambda x: clip_contrastive(x, w, 9.0),
        lambda x: clip_contrastive(x, w, 9.0, reduction="none").sum(),
        lambda x: prototype_cross_entropy(Similarity(x, w, 9.0), target),
        lambda x: siglip(w, x, 9.0, -1.0),
        lambda x: distilled(x, fixed),
        lambda x: pair_teacher_kl(Similarity(w, x, 9.0), [fixed]),
    ]


def test_forward_mode_is_refused(unit: Callable[..., Tensor]) -> None:
    x, w = unit(6, 4), unit(6, 4)
    others = [
        lambda x: siglip(w, w, 9.0, x[0, 0]),
        lambda x: distilled(w, Similarity(x, w, 9.0)),
        lambda x: distilled(w, Similarity(w, w, x[0, 0])),
    ]
    for loss in (*losses_of(w), *others):
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(loss, (x,), (w,))
    if torch_private.reason() is None:
        compiled = torch.compile(torch.func.jvp, backend="eager")
        with pytest.raises(RuntimeError, match="forward-mode"):
            compiled(of_pairs, (x,), (w,))


def test_transforms_that_differentiate_are_refused(unit: Callable[..., Tensor]) -> None:
    x, w = unit(6, 4), unit(6, 4)
    for loss in losses_of(w):
        for transform in (torch.func.grad(loss), torch.func.jacrev(loss)):
            with pytest.raises(RuntimeError, match=r"use torch\.autograd\.grad"):
                transform(x)
    # A transform between the two hides from the loss that it is differentiated.
    with pytest.raises(RuntimeError, match=r"use torch\.autograd\.grad"):
        torch.func.grad(lambda xs: torch.func.vmap(of_pairs)(xs).sum())(torch.stack([x, x]))
    # A loss of constants may stand inside.
    inside = torch.func.grad(lambda q: q.sum() + of_pairs(x.float()).detach())
    assert inside(torch.ones(3)).equal(torch.ones(3))


@needs_private
@pytest.mark.parametrize("backend_of_compile", ["", "aot_eager"])
def test_gradients_flow_through_vmap_of_a_mean(
    backend_of_compile: str, unit: Callable[..., Tensor]
) -> None:
    xs = torch.stack([unit(6, 4), unit(6, 4)]).requires_grad_()

    def mapped(rows: Tensor) -> Tensor:
        return torch.vmap(of_pairs)(rows).sum()

    one_by_one = torch.autograd.grad(sum(of_pairs(x) for x in xs), xs)
    total = mapped
    if backend_of_compile:
        total = torch.compile(mapped, backend=backend_of_compile)
    torch.testing.assert_close(torch.autograd.grad(total(xs), xs), one_by_one)


def test_vmap_where_it_is_promised(unit: Callable[..., Tensor]) -> None:
    x, w = torch.stack([unit(6, 4), unit(6, 4)]), unit(5, 4)
    got = torch.vmap(lambda v: prototype_similarity(v, w, 9.0))(x)
    torch.testing.assert_close(got, 9 * x @ w.T)
    for distil in (teacher_kl, pair_teacher_kl):
        with pytest.raises(RuntimeError):
            torch.vmap(lambda v, f=distil: f(Similarity(v, v, 9.0), [Similarity(v, v, 9.0)]))(x)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, reduction: str) -> None:
    if name not in LOSSES and reduction == "mean":
        pytest.skip("has no reduction")
    case = variant(name, 3, 4, 2)
    inputs = case.inputs(torch.float64)
    names = list(inputs.leaves)
    asked = {"reduction": reduction} if name in LOSSES else {}

    def loss(*leaves: Tensor) -> Tensor:
        of = dict(zip(names, leaves, strict=True))
        options = {**inputs.options, **asked}
        if "weights" in of:
            options["weights"] = of.pop("weights")
        rest = inputs.arguments[len(of) :]
        return MULKI[case.operator](*of.values(), *rest, **options)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(loss, list(inputs.leaves.values()))
    with use_backend("chunked"):  # which takes float64 where it is forced
        found = computed(case.operator, inputs, reduction)
    with use_backend("reference"):
        wanted = computed(case.operator, inputs, reduction)
    same(found, wanted, rtol=1e-9, atol=1e-11)
