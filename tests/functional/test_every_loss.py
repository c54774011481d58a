"""What holds for all losses alike."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from mulki import Similarity
from mulki.functional import (
    clip_contrastive,
    dual_teacher_kl,
    prototype_cross_entropy,
    siglip,
    teacher_kl,
)
from tests.functional.formulas import (
    GATES,
    MASK,
    TARGET,
    D,
    N,
    P,
    S,
    W,
    X,
    all_losses,
    leaves,
)


def test_targets_are_not_read_on_a_gpu():
    # Fake tensors have no values, so whatever reads one (and would make the GPU wait) raises. They
    # cannot negate a mask where torch has no GPU support, hence no masks and no cross-entropy.
    with FakeTensorMode():
        x, w = torch.empty(N, D, device="cuda"), torch.empty(P, D, device="cuda")
        scale, target = torch.empty((), device="cuda"), torch.empty(N, device="cuda").long()
        s = Similarity(x, w, scale)
        losses = [dual_teacher_kl(s, s, s, gate=gate, target=target) for gate in GATES]
        losses += [clip_contrastive(x, x, scale, scale), siglip(x, x, scale, scale)]
        assert all(loss.is_cuda for loss in losses)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(student, teachers, unit):
    def there(s):
        return Similarity(*(tensor.detach().float().cuda() for tensor in leaves(s)))

    student = there(student)
    student.features.requires_grad_()
    weights, target, mask = unit(N, 3).cuda(), TARGET.cuda(), MASK.cuda()
    teachers = [
        Similarity(t.features.float().cuda(), t.prototypes.float().cuda(), t.scale)
        for t in teachers
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.stack(
            list(all_losses(student, teachers, weights, target, mask).values())
        ).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_graph_break(student, teachers, unit):
    weights = unit(N, 3).abs()
    inputs = [tensor.detach() for tensor in leaves(student)]
    compiled = torch.compile(
        lambda *o: all_losses(Similarity(*o), teachers, weights), fullgraph=True, backend="eager"
    )
    for name, expected in all_losses(Similarity(*inputs), teachers, weights).items():
        torch.testing.assert_close(compiled(*inputs)[name], expected)


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_a_new_scale_is_no_recompilation_and_a_new_temperature_is_one(make):
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(scale, temperature):
        s = Similarity(X, W, scale)
        kl = teacher_kl(s, [S, Similarity(X, W, scale)], temperature=temperature)
        return siglip(X, X, scale, -3.0) + kl

    for scale in (2.0, 3.0, 4.0):  # a float becomes symbolic at its second value
        assert loss(make(scale), 2.0).isfinite()
    before = counter.frame_count
    for scale in (5.0, 6.0):
        loss(make(scale), 2.0)
    assert counter.frame_count == before
    for temperature in (3.0, 4.0):
        loss(make(5.0), temperature)
    assert counter.frame_count == before + 2


def test_any_real_number_will_do(unit):
    x, w, pairs = unit(N, D).float(), unit(P, D).float(), unit(N, D).float()

    def losses(half):
        s, teachers = Similarity(x, w, half), [Similarity(pairs, w, t) for t in (half, 9.0, half)]
        return [
            prototype_cross_entropy(s, TARGET, label_smoothing=half, check_finite=True),
            teacher_kl(s, teachers, temperature=half, gate="confidence", gate_temperature=half),
            teacher_kl(s, [teachers[0]] * 2),
            siglip(x, pairs, half, half, check_finite=True),
        ]

    for got, want in zip(losses(Fraction(1, 2)), losses(0.5), strict=True):
        assert got.equal(want)
