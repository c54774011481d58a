"""What one model says of a batch."""

from __future__ import annotations

import torch

from mulki.features import Features


def test_class_logits_are_those_of_the_models_own_scale(student: Features) -> None:
    logits = student.image_text()
    assert logits.shape == (6, 4) and logits.requires_grad
    torch.testing.assert_close(
        logits.materialize(), student.scale * student.images @ student.texts.T
    )
