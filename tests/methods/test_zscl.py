"""ZSCL: distillation on a reference set with the teacher's captions, averaged, anchored weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.nn.functional as F

from mulki import methods
from mulki.clip.features import of_reference
from mulki.methods import PREVIOUS, ZERO_SHOT
from mulki.methods.zscl import ZSCL
from tests.methods.method_helpers import add, assert_same_gradients, start


@pytest.mark.parametrize("teacher", [ZERO_SHOT, PREVIOUS])
def test_what_it_asks_for(teacher):
    needs = ZSCL(ZSCL.Options(teacher=teacher)).needs
    assert needs == methods.Needs(
        (teacher,), teacher_images=False, reference=True, student_captions=False
    )


def test_losses_are_those_of_the_formula(student, model_features, unit, target):
    images = unit(7, 5).requires_grad_()
    student = replace(student, reference=of_reference(images, None, student.scale))
    pairs = of_reference(unit(7, 5), unit(7, 5), 4.0)
    options = ZSCL.Options(label_smoothing=0.1, image_loss=0.7, text_loss=0.3, temperature=3.0)
    losses = ZSCL(options).losses(student, (replace(model_features(), reference=pairs),), target)

    # Both matrices are built on the teacher's captions.
    ours = student.scale * images @ pairs.texts.T / 3.0
    theirs = pairs.scale * pairs.images @ pairs.texts.T / 3.0

    def divergence(theirs, ours):
        p = theirs.softmax(1)
        return 3.0**2 * (p * (p.log() - ours.log_softmax(1))).sum(1).mean()

    z = student.scale * student.images @ student.texts.T
    expected = {
        "ce_loss": F.cross_entropy(z, target, label_smoothing=0.1),
        "image_loss": 0.7 * divergence(theirs, ours),
        "text_loss": 0.3 * divergence(theirs.T, ours.T),
    }
    assert_same_gradients(losses, expected, [student.images, student.texts, images])


def test_defaults_are_those_of_the_source():
    options = ZSCL.Options()
    assert (options.image_loss, options.text_loss, options.l2) == (1.0, 1.0, 1.0)
    assert (options.temperature, options.we_every, options.teacher) == (2.0, 100, ZERO_SHOT)


def test_weights_are_averaged_within_a_task_and_anchored_to_its_start(weights):
    method = start(ZSCL(ZSCL.Options(we_every=2, l2=0.5)), weights)
    for step in range(1, 5):
        add(weights, 1.0)
        method.after_step(step)
    assert method.penalties() == {"anchor_loss": 0.5 * 4 * 4.0**2}
    method.end_task()
    # The start at 1 and the weights after steps 2 and 4, at 3 and 5.
    assert weights["a"].tolist() == [3, 3, 3]
    start(method, weights, index=1)
    assert method.penalties() == {"anchor_loss": 0}


def test_without_both_the_last_weights_stay(weights):
    method = start(ZSCL(ZSCL.Options(we_every=0, l2=0.0)), weights)
    add(weights, 1.0)
    method.after_step(1)
    assert method.penalties() == {}
    method.end_task()
    assert weights["a"].tolist() == [2, 2, 2]
