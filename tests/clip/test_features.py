"""What one model says of a batch."""

from __future__ import annotations

import torch

from mulki.clip.features import Features, of_reference


def test_class_logits_are_those_of_the_models_own_scale(student: Features) -> None:
    logits = student.image_text()
    assert logits.shape == (6, 4) and logits.requires_grad
    torch.testing.assert_close(
        logits.materialize(), student.scale * student.images @ student.texts.T
    )


def test_reference_images_without_captions_have_no_rows_of_them() -> None:
    images = torch.eye(4)[:3]
    assert of_reference(images, None, 2.0).texts.shape == (0, 4)
    pairs = of_reference(images, images.flip(0), 2.0)
    assert pairs.texts.equal(images.flip(0)) and pairs.images is images and pairs.scale == 2.0
