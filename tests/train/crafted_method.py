"""A method that crafts images with the gradient of two models, as a user would write it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mulki.clip.features import Features
from mulki.functional import prototype_cross_entropy
from mulki.methods import PREVIOUS, ZERO_SHOT, Encode, Method, Needs, option


class Crafted(Method):
    """Cross-entropy, and the student near its teachers where it and the previous model differ."""

    # As of `reference_method`, the tests that need a name set one.
    summary = "cross-entropy and distillation on crafted images"
    needs = Needs(teachers=(ZERO_SHOT, PREVIOUS), inputs=True)
    options: Options

    @dataclass(frozen=True)
    class Options(Method.Options):
        length: float = option(2.0, "of the step from an image", low=0)
        noise: float = option(0.0, "added to an image before that step", low=0)

    def inputs(
        self, images: Tensor, target: Tensor, teachers: tuple[Features, ...], encode: Encode
    ) -> Tensor:
        noise = torch.randn(images.shape, dtype=images.dtype).to(images.device)
        start = (images + self.options.noise * noise).requires_grad_()
        # Away from the class's text, and from what the previous model says of the image.
        texts = teachers[0].texts[target]
        near = encode(start) * encode(start, 1) + encode(start, 0) * (texts + teachers[0].images)
        (gradient,) = torch.autograd.grad(near.sum(), start)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        return start - self.options.length * gradient / length

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        terms = {"ce_loss": prototype_cross_entropy(student.image_text(), target)}
        for place, teacher in enumerate(teachers):
            assert student.inputs is not None and teacher.inputs is not None
            away = (student.inputs - teacher.inputs).square().sum(dim=1)
            terms[f"crafted_{place}_loss"] = 5 * away.mean()
        return terms
