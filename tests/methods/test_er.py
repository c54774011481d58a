"""Experience replay: two cross-entropies, the second over all classes so far."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from mulki.clip.features import Features
from mulki.methods import Needs, Replay
from mulki.methods.er import ER
from mulki.methods.finetune import Finetune
from tests.methods.method_helpers import assert_same_gradients


def test_kept_images_are_told_apart_among_all_classes(student, target, unit):
    old, more = unit(3, 5).requires_grad_(), unit(2, 5).requires_grad_()
    theirs = torch.tensor([4, 5, 1])
    known = Features(old, torch.cat([student.texts, more]), student.scale)
    method = ER(ER.Options(label_smoothing=0.1, replay_weight=0.7))
    losses = method.losses(replace(student, replay=known, replay_target=theirs), (), target)
    z = student.scale * student.images @ student.texts.T
    z_old = student.scale * old @ torch.cat([student.texts, more]).T
    wanted = {
        "ce_loss": F.cross_entropy(z, target, label_smoothing=0.1),
        "replay_loss": 0.7 * F.cross_entropy(z_old, theirs, label_smoothing=0.1),
    }
    assert_same_gradients(losses, wanted, [student.images, student.texts, old, more])


def test_the_first_task_is_that_of_finetune(student, target):
    losses = ER(ER.Options(label_smoothing=0.1)).losses(student, (), target)
    assert losses == Finetune(Finetune.Options(label_smoothing=0.1)).losses(student, (), target)


def test_its_options_say_what_is_kept():
    method = ER(ER.Options(buffer_size=7, buffer="reservoir", replay_batch_size=2))
    assert method.needs == Needs(replay=Replay(7, "reservoir", 2))
    assert method.needs.uses == ("class names of earlier tasks", "images of earlier tasks")
    assert method.needs.without_classes() == Needs() and not ER.takes_captions()
