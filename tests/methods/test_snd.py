"""Select-and-Distill: two teachers on reference images, weighted by how far they differ."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from mulki import methods
from mulki.clip.features import of_reference
from mulki.methods import PREVIOUS, ZERO_SHOT
from mulki.methods.snd import SnD
from tests.methods.method_helpers import assert_same_gradients


def test_what_it_asks_for():
    needs = SnD(SnD.Options()).needs
    assert needs == methods.Needs(
        (ZERO_SHOT, PREVIOUS), teacher_images=False, reference=True, captions=False
    )


def test_losses_are_those_of_the_formula(student, teachers, unit, target):
    images = unit(7, 5).requires_grad_()
    original = unit(7, 5)
    # Teachers that are alike, near each other, and far from each other.
    steps = torch.tensor([0, 0, 0.05, 0.1, 0.3, 1, 3], dtype=torch.float64).unsqueeze(1)
    previous = F.normalize(original + steps * unit(7, 5), dim=1)
    student, zero_shot, before = (
        replace(model, reference=of_reference(features, None, model.scale))
        for model, features in zip((student, *teachers), (images, original, previous), strict=True)
    )
    options = SnD.Options(label_smoothing=0.1, previous_weight=7.0, zero_shot_weight=0.3)
    losses = SnD(options).losses(student, (zero_shot, before), target)

    total = {"previous_loss": 0.0, "zero_shot_loss": 0.0}
    for r in range(7):
        w = 1 / (1 + torch.exp(-6 * ((original[r] - previous[r]).norm() - 0.2)))
        total["previous_loss"] += 7.0 * w * ((images[r] - previous[r]) ** 2).sum() / 7
        total["zero_shot_loss"] += 0.3 * (1 - w) * ((images[r] - original[r]) ** 2).sum() / 7
    z = student.scale * student.images @ student.texts.T
    expected = {"ce_loss": F.cross_entropy(z, target, label_smoothing=0.1), **total}
    assert_same_gradients(losses, expected, [student.images, student.texts, images])


def test_a_display_sees_the_weights_of_the_last_batch(student, teachers, unit, target):
    method = SnD(SnD.Options())
    assert method.watched() == {}
    student, zero_shot, before = (
        replace(model, reference=of_reference(unit(7, 5), None, model.scale))
        for model in (student, *teachers)
    )
    method.losses(student, (zero_shot, before), target)
    weights = method.watched()["teacher_weights"]
    assert weights.shape == (7, 2) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(7, dtype=weights.dtype))
    distance = (zero_shot.reference.images - before.reference.images).norm(dim=1)
    torch.testing.assert_close(weights[:, 1], torch.sigmoid(6 * (distance - 0.2)))


def test_defaults_are_those_of_the_source():
    options = SnD.Options()
    assert (options.previous_weight, options.zero_shot_weight) == (9.0, 0.5)
    assert options.label_smoothing == 0.0
