"""The public functions beside their values: defaults, numbers, autocast, devices and compiling."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from mulki import Similarity
from mulki.bench.cases import VARIANTS, variant
from mulki.bench.losses import MULKI
from mulki.functional import (
    clip_contrastive,
    dual_teacher_kl,
    pair_teacher_kl,
    prototype_cross_entropy,
    prototype_similarity,
    siglip,
    teacher_kl,
)

N, P, D = 6, 5, 4
TARGET = torch.tensor([0, 2, 3, 3, 2, 0])
Unit = Callable[[int, int], Tensor]


@pytest.fixture
def models(unit: Unit) -> list[Similarity]:
    """A student and two teachers, each with its own width and scale."""
    return [Similarity(unit(N, d), unit(P, d), s) for d, s in ((4, 9.0), (3, 8.0), (7, 5.0))]


@pytest.mark.parametrize("gate", ["uniform", "confidence", "label", None])
def test_two_teachers_are_teacher_kl(models: list[Similarity], gate: str | None) -> None:
    student, *teachers = models
    options: dict[str, Any] = {"gate": gate, "gate_temperature": 0.5, "target": TARGET}
    options |= {"temperature": 3.0, "scale_by_t2": False, "return_details": True}
    got, details = dual_teacher_kl(student, *teachers, **options)
    expected, wanted = teacher_kl(student, teachers, **options)
    assert got.equal(expected)
    assert all(map(torch.equal, details, wanted))


def test_defaults_of_two_teachers(models: list[Similarity], unit: Unit) -> None:
    student, *teachers = models
    label = teacher_kl(student, teachers, temperature=2.0, gate="label", target=TARGET)
    assert dual_teacher_kl(student, *teachers, target=TARGET) == label
    # Weights replace the gate, and need not sum to one.
    weights = unit(N, 2).abs()
    given = teacher_kl(student, teachers, temperature=2.0, weights=weights)
    assert dual_teacher_kl(student, *teachers, weights=weights) == given


def test_without_a_gate_teachers_count_equally(models: list[Similarity]) -> None:
    student, *teachers = models
    loss, details = teacher_kl(student, teachers, return_details=True)
    assert loss == teacher_kl(student, teachers, gate="uniform")
    torch.testing.assert_close(details.weights, torch.full((N, 2), 0.5).double())


def test_a_target_that_the_gate_does_not_want_is_not_looked_at(models: list[Similarity]) -> None:
    student, *teachers = models
    options: tuple[dict[str, Any], ...] = ({"gate": "confidence"}, {"weights": torch.ones(N, 2)})
    for given in (*options, {}):
        expected = teacher_kl(student, teachers, **given)
        for target in (TARGET[:2], TARGET + 100, TARGET.int(), TARGET.float()):
            assert teacher_kl(student, teachers, **given, target=target).equal(expected)


def test_any_real_number_will_do(unit: Unit) -> None:
    x, w, pairs = unit(N, D).float(), unit(P, D).float(), unit(N, D).float()

    def losses(half: Any) -> list[Tensor]:
        s, teachers = Similarity(x, w, half), [Similarity(pairs, w, t) for t in (half, 9.0, half)]
        return [
            prototype_cross_entropy(s, TARGET, label_smoothing=half, check_finite=True),
            teacher_kl(s, teachers, temperature=half, gate="confidence", gate_temperature=half),
            siglip(x, pairs, half, half, check_finite=True),
        ]

    as_tensor = prototype_cross_entropy(Similarity(x, w, torch.tensor(0.5)), TARGET)
    assert as_tensor.equal(prototype_cross_entropy(Similarity(x, w, 0.5), TARGET))
    assert all(map(torch.equal, losses(Fraction(1, 2)), losses(0.5)))


def test_a_scale_of_another_dtype_has_its_gradient(unit: Unit) -> None:
    x, w = unit(N, D).float(), unit(P, D).float()
    log_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        prototype_cross_entropy(Similarity(x, w, log_scale.exp()), TARGET).backward()
    twin = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    logits = twin.exp() * (x.double() @ w.double().T)
    torch.nn.functional.cross_entropy(logits, TARGET).backward()
    torch.testing.assert_close(log_scale.grad, 2 * twin.grad, rtol=1e-5, atol=1e-7)


def test_autocast_takes_features_beside_frozen_prototypes_in_float32(unit: Unit) -> None:
    layer, images = torch.nn.Linear(D, D).requires_grad_(), unit(N, D).float()
    texts, pairs = unit(P, D).float(), unit(N, D).float()
    scale = torch.tensor(9.0, requires_grad=True)

    def losses(x: Tensor, w: Tensor, pairs: Tensor) -> list[Tensor]:
        s = Similarity(x, w, scale)
        return [
            prototype_cross_entropy(s, TARGET),
            teacher_kl(s, [Similarity(x.detach().roll(1, 0), w, 7.0)]),
            clip_contrastive(x, pairs, scale),
            siglip(pairs, x, scale, -3.0),
            prototype_similarity(x, w, scale).float().square().mean(),
        ]

    with torch.autocast("cpu", torch.bfloat16):
        x = layer(images)
        got = losses(x, texts, pairs)
    expected = losses(x, texts.bfloat16(), pairs.bfloat16())
    for loss, want in zip(got, expected, strict=True):
        assert loss.dtype == torch.float32 and loss.equal(want)
        gradients, wanted = (
            torch.autograd.grad(one, (layer.weight, scale), retain_graph=True)
            for one in (loss, want)
        )
        assert all(map(torch.equal, gradients, wanted))


def test_targets_are_not_read_on_a_gpu() -> None:
    # Fake tensors have no values, so whatever reads one (and would make the GPU wait) raises. They
    # cannot negate a mask where torch has no GPU support, hence no masks and no cross-entropy.
    with FakeTensorMode():
        x, w = torch.empty(N, D, device="cuda"), torch.empty(P, D, device="cuda")
        scale, target = torch.empty((), device="cuda"), torch.empty(N, device="cuda").long()
        s = Similarity(x, w, scale)
        gates = ("uniform", "confidence", "label", "discrepancy")
        losses = [dual_teacher_kl(s, s, s, gate=gate, target=target) for gate in gates]
        losses += [clip_contrastive(x, x, scale, scale), siglip(x, x, scale, scale)]
        assert all(loss.is_cuda for loss in losses)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    for name in VARIANTS:
        case = variant(name, device="cuda")
        inputs = case.inputs()
        torch.cuda.set_sync_debug_mode("error")
        try:
            inputs.call(MULKI[case.operator]).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_a_new_scale_is_no_recompilation_and_a_new_temperature_is_one(
    make: Callable[[float], Any],
) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    x, w = torch.ones(N, D), torch.ones(N, D)

    @torch.compile(backend=counter, fullgraph=True)
    def loss(scale: Any, temperature: float) -> Tensor:
        s = Similarity(x, w, scale)
        kl = teacher_kl(s, [Similarity(x, w), s], temperature=temperature)
        pairs = pair_teacher_kl(s, [Similarity(x, w)], temperature=temperature)
        return siglip(x, x, scale, -3.0) + kl + pairs

    for scale in (2.0, 3.0, 4.0):  # a float becomes symbolic at its second value
        assert loss(make(scale), 2.0).isfinite()
    before = counter.frame_count
    for scale in (5.0, 6.0):
        loss(make(scale), 2.0)
    assert counter.frame_count == before
    for temperature in (3.0, 4.0):
        loss(make(5.0), temperature)
    assert counter.frame_count == before + 2
