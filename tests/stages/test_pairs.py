"""The objective on images with captions, by its formulas and by the public losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mulki.clip.features import Features
from mulki.losses import ClipLoss, DualTeacherClipLoss, MulKILoss
from mulki.ops.gates import Weighting
from mulki.stages import pairs
from tests.stages.formulas import expected_feature

B, D = 6, 8


def model(seed: int, grad: bool = False, scale: float = 12.0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    images, texts = (
        F.normalize(torch.randn(B, D, generator=generator), dim=-1).requires_grad_(grad)
        for _ in range(2)
    )
    return Features(images, texts, torch.tensor(scale))


def gradients(loss: torch.Tensor, student: Features) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, (student.images, student.texts))


def test_contrastive_is_that_of_clip() -> None:
    student = model(0)
    ours = pairs.contrastive_loss(student, None)
    torch.testing.assert_close(ours, ClipLoss()(student.images, student.texts, student.scale))


def test_rows_that_repeat_are_no_negatives() -> None:
    student = model(0, grad=True)
    rows = torch.tensor([0, 2, 5])
    loss = pairs.contrastive_loss(student, rows)
    z = student.scale * student.images[rows] @ student.texts[rows].T
    target = torch.arange(3)
    expected = (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2
    torch.testing.assert_close(loss, expected)
    of_images, of_texts = gradients(loss, student)
    for grad in (of_images, of_texts):
        assert (grad[rows] != 0).any(dim=1).all() and (grad[[1, 3, 4]] == 0).all()


@pytest.mark.filterwarnings("ignore:.*pass distill_weight")
@pytest.mark.parametrize("gate", ["uniform", "label", "confidence", "discrepancy"])
def test_the_relation_is_the_distillation_of_the_public_loss(gate: str) -> None:
    student, teachers = model(0, grad=True), [model(1, scale=9.0), model(2)]
    objective = MulKILoss(gate=gate, image_caption=1.0, feature=0.0, temperature=2.0)
    terms, weights = objective.pair_terms(student, teachers)
    assert set(terms) == {"contrastive_loss", "image_caption_loss"}
    of_teachers = [x for t in teachers for x in (t.images, t.texts, t.scale)]
    contrastive, distill = DualTeacherClipLoss(gate=gate, temperature=2.0)(
        student.images, student.texts, student.scale, *of_teachers
    )
    torch.testing.assert_close(terms["contrastive_loss"], contrastive)
    # They differ by the entropies of the teachers, which have no gradient.
    ours = gradients(terms["image_caption_loss"], student)
    theirs = gradients(distill, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert weights is not None and weights.shape == (B, 2)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(B))


def test_the_label_of_the_gate_is_the_own_pair() -> None:
    student, teachers = model(0), [model(1), model(2)]
    _, weights = pairs.gated_relation(student, teachers, Weighting.of("label"), 2.0, True)
    log_p = [F.log_softmax(t.scale * t.images @ t.texts.T / 2.0, dim=1).diag() for t in teachers]
    torch.testing.assert_close(weights, torch.stack(log_p, dim=1).softmax(dim=1))


def test_terms_have_their_coefficients() -> None:
    student, teachers = model(0), [model(1), model(2)]
    one, weights = MulKILoss(image_caption=1.0, feature=1.0).pair_terms(student, teachers)
    assert weights is not None
    expected = expected_feature(student, teachers, weights)
    torch.testing.assert_close(one["feature_loss"], expected)
    other, _ = MulKILoss(image_caption=0.5, feature=3.0).pair_terms(student, teachers)
    torch.testing.assert_close(other["image_caption_loss"], one["image_caption_loss"] / 2)
    torch.testing.assert_close(other["feature_loss"], 3 * one["feature_loss"])
    two, weights = MulKILoss(feature=3.0, feature_original=0.5).pair_terms(student, teachers)
    assert weights is not None
    expected = expected_feature(student, teachers, weights * torch.tensor([0.5, 3.0]))
    torch.testing.assert_close(two["feature_loss"], expected)


def test_the_options_of_classes_have_no_say() -> None:
    student, teachers = model(0), [model(1), model(2)]
    names = ("image_text", "image_image", "text_image", "text_text", "image_anchor", "text_anchor")
    options = {"gate": "discrepancy", "hold_on": "made"}
    whole, weights = MulKILoss(**options).pair_terms(student, teachers)  # type: ignore[arg-type]
    assert set(whole) == {"contrastive_loss", "image_caption_loss", "feature_loss"}
    for value in (0.0, 3.0):
        others = dict.fromkeys((*names, "alignment", "prototype"), value)
        loss = MulKILoss(gate="discrepancy", label_smoothing=0.1, **others)  # type: ignore[arg-type]
        terms, wanted = loss.pair_terms(student, teachers)
        assert terms == whole and torch.equal(wanted, weights)  # type: ignore[arg-type]


def test_terms_that_are_off_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teachers = model(0), [model(1), model(2)]
    alone, weights = MulKILoss(image_caption=0.0, feature=0.0).pair_terms(student, [])
    assert set(alone) == {"contrastive_loss"} and weights is None
    whole, wanted = MulKILoss(image_caption=1.0, feature=1.0).pair_terms(student, teachers)
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "gated_relation", None)  # not even computed
        some, weights = MulKILoss(image_caption=0.0, feature=1.0).pair_terms(student, teachers)
    assert set(some) == {"contrastive_loss", "feature_loss"}
    torch.testing.assert_close(weights, wanted)
    torch.testing.assert_close(some["feature_loss"], whole["feature_loss"])
