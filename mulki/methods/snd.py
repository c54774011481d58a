"""snd: Select-and-Distill (Yu et al., ECCV 2024).

    L = CE(s u w^T, y) + 9 mean_r[w_r |v_r - v_r^prev|^2] + 0.5 mean_r[(1 - w_r) |v_r - v_r^0|^2]
    w_r = sigmoid(6 (|v_r^0 - v_r^prev| - 0.2))

with v features of the R images of a reference batch, by the student, the model after the previous
task, and the original model (0). Where the two teachers differ, an image looks like what an earlier
task has taught, and the previous model counts for more. The weights w are the gate
``discrepancy``.

Source: the formula of the paper; the constants, and a cross-entropy without label smoothing, are
those of its code. What differs: the code multiplies the weights, a column, with the distances, a
row, so that each of its terms is the mean weight times the mean distance; here the product is taken
image by image, as in the paper. The code freezes the text tower: ``--lock-text``. The reference
images of the paper are 100,000 of ImageNet, without labels. Captions are not used. With
``--reference current`` the images are the task's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mulki.choices.options import option
from mulki.clip.features import Features
from mulki.methods.base import PREVIOUS, ZERO_SHOT, ClassLoss, Needs
from mulki.ops.gates import discrepancy
from mulki.stages.adding import feature_loss


class SnD(ClassLoss):
    """Two teachers on reference images, weighted by how far they differ."""

    name = "snd"
    summary = "Select-and-Distill: features of reference images kept near two teachers"
    options: Options
    needs = Needs(
        teachers=(ZERO_SHOT, PREVIOUS), teacher_images=False, reference=True, captions=False
    )
    # Of the last batch.
    _weight: Tensor | None = None

    @dataclass(frozen=True)
    class Options(ClassLoss.Options):
        previous_weight: float = option(
            9.0, "coefficient of the distance from the previous model", low=0
        )
        zero_shot_weight: float = option(
            0.5, "coefficient of the distance from the original model", low=0
        )

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        o = self.options
        ours, original, previous = (model.reference for model in (student, *teachers))
        assert ours is not None and original is not None and previous is not None
        w = discrepancy(original.images, previous.images).unsqueeze(1)
        self._weight = w.detach()
        return super().losses(student, teachers, target) | {
            "previous_loss": o.previous_weight * feature_loss(ours, [previous], w),
            "zero_shot_loss": o.zero_shot_weight * feature_loss(ours, [original], 1 - w),
        }

    def watched(self) -> dict[str, Tensor]:
        if self._weight is None:
            return {}
        return {"teacher_weights": torch.cat([1 - self._weight, self._weight], dim=1)}
