"""LwF via replayed vocabulary: cross-entropy, and the previous model's answers over words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mulki import methods
from mulki.methods import PREVIOUS, VOCABULARY
from mulki.methods.lwf_vr import LwFVR
from tests.methods.method_helpers import assert_same_gradients


def test_it_asks_for_the_words_of_both_models():
    needs = LwFVR(LwFVR.Options()).needs
    assert needs == methods.Needs((PREVIOUS,), anchors=(VOCABULARY,), student_anchors=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_losses_are_those_of_the_formula(student, model_features, unit, target, temperature):
    words = unit(7, 5).requires_grad_()
    student = replace(student, anchored=torch.cat([student.texts, words]))
    previous = model_features(width=3, scale=4.0)
    previous = replace(previous, anchored=torch.cat([previous.texts, unit(7, 3)]))
    options = LwFVR.Options(label_smoothing=0.1, distill_weight=0.7, temperature=temperature)
    losses = LwFVR(options).losses(student, (previous,), target)

    log_q = (student.scale * student.images @ words.T / temperature).log_softmax(1)
    p = (previous.scale * previous.images @ previous.vocabulary.T / temperature).softmax(1)
    z = student.scale * student.images @ student.texts.T
    expected = {
        "ce_loss": F.cross_entropy(z, target, label_smoothing=0.1),
        "distill_loss": 0.7 * temperature**2 * (p * (p.log() - log_q)).sum(1).mean(),
    }
    assert_same_gradients(losses, expected, [student.images, student.texts, words])


def test_defaults_of_the_term_are_those_of_the_authors():
    options = LwFVR.Options()
    assert (options.distill_weight, options.temperature) == (0.5, 1.0)


def test_words_that_are_all_classes_leave_the_cross_entropy(student, model_features, target):
    losses = LwFVR(LwFVR.Options()).losses(student, (model_features(),), target)
    assert list(losses) == ["ce_loss"]
