"""torch.compile takes the public functions whole, with sizes and scales that change."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo.compiled_autograd
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from mulki import Similarity
from mulki.functional import (
    clip_contrastive,
    dual_teacher_kl,
    prototype_cross_entropy,
    prototype_similarity,
    siglip,
    teacher_kl,
)


def losses(x, w, u, v, target, scale, other, temperature, smoothing):
    """Every public function with gradients, reduced and not; scale and other may be floats."""
    student = Similarity(x, w, scale)
    teachers = [Similarity(u, v, other).detach(), Similarity(u, v, scale).detach()]
    return torch.stack(
        [
            prototype_similarity(x, w, scale, normalize=True).square().mean(),
            student.materialize().square().mean(),
            prototype_cross_entropy(student, target, label_smoothing=smoothing),
            prototype_cross_entropy(student, target, reduction="none").square().mean(),
            teacher_kl(student, teachers, temperature=temperature),
            teacher_kl(
                student,
                teachers,
                gate="label",
                target=target,
                gate_temperature=temperature,
                reduction="none",
            ).mean(),
            dual_teacher_kl(student, *teachers, gate="discrepancy"),
            clip_contrastive(x, u, scale, -3.0),
            siglip(x, u, scale, -other, reduction="sum"),
        ]
    )


def inputs(n: int, p: int, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def rows(count, d=16):
        return F.normalize(torch.randn(count, d, generator=generator), dim=1)

    leaves = rows(n).requires_grad_(), rows(p).requires_grad_()
    return *leaves, rows(n), rows(p), torch.randint(p, (n,), generator=generator)


def check(compiled, eager, scales: str) -> None:
    for seed, (n, p) in enumerate([(6, 5), (9, 7)]):
        numbers = 10.0 + seed, 12.0 - seed
        if scales == "tensors":
            numbers = tuple(torch.tensor(value, requires_grad=True) for value in numbers)
        options = *numbers, 2.0 - seed / 4, 0.1 + seed / 10
        tensors = inputs(n, p, seed)
        leaves = [
            t for t in (*tensors, *options) if isinstance(t, torch.Tensor) and t.requires_grad
        ]
        got, want = (f(*tensors, *options) for f in (compiled, eager))
        torch.testing.assert_close(got, want)
        # The compiled backward frees its buffers, so the terms are taken at once.
        grad = torch.linspace(-1, 2, len(want))
        for a, b in zip(
            torch.autograd.grad(got, leaves, grad),
            torch.autograd.grad(want, leaves, grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dynamic", "scales"), [(None, "tensors"), (True, "floats")])
def test_one_graph_for_forward_and_backward(dynamic, scales):
    torch._dynamo.reset()
    options = {"fullgraph": True, "dynamic": dynamic, "backend": "aot_eager"}
    check(torch.compile(losses, **options), losses, scales)


def of_student(x, w, u, v, scale):
    return clip_contrastive(x, u, scale)


def of_teacher(x, w, u, v, scale):
    return teacher_kl(Similarity(x, w, 2.0), [Similarity(u, v, scale).detach()])


@pytest.mark.parametrize("loss", [of_student, of_teacher])
def test_new_scales_compile_once_more_at_most(loss):
    features = inputs(6, 5, 0)[:4]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for number in range(5):
        scale = 3.0 + number
        torch.testing.assert_close(compiled(*features, scale), loss(*features, scale))
    # The first value is taken for a constant, the second for a variable.
    assert counter.frame_count <= 2


def two_losses(x, w, u, v, target, scale, other, temperature, smoothing):
    student, teacher = Similarity(x, w, scale), Similarity(u, v, other)
    ce = prototype_cross_entropy(student, target, label_smoothing=smoothing)
    return torch.stack([ce, teacher_kl(student, [teacher], temperature=temperature)])


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    check(torch.compile(two_losses, fullgraph=True, dynamic=True), two_losses, "floats")


@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_compiled_autograd_takes_the_backward_pass_whole(upstream):
    torch._dynamo.reset()
    x, w, _, _, target = inputs(6, 5, 0)
    loss = upstream * prototype_cross_entropy(Similarity(x, w, 10.0), target)
    want = torch.autograd.grad(loss, (x, w), retain_graph=True)
    compile_whole = partial(torch.compile, backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compile_whole):
        loss.backward()
    for leaf, gradient in zip((x, w), want, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_without_gradients_and_under_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    tensors = inputs(6, 5, 0)
    options = 10.0, 12.0, 2.0, 0.1
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors, *options), losses(*tensors, *options))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(*tensors, *options), losses(*tensors, *options)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    assert got.dtype == torch.float32
