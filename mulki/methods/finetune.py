"""finetune: the loss of each task in turn, without any term against forgetting.

    L = CE_ls(s u w^T, y)                                       on images with classes
    L = 1/2 [CE(s u w^T, diagonal) + CE(s w u^T, diagonal)]     on images with captions

The logit scale s is fixed, as for every method (`VisionLanguageModel.lock`). Fine-tuning with a
fixed temperature is a strong baseline in LfI (CVPR 2026).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mulki.clip.features import Features
from mulki.functional import prototype_cross_entropy
from mulki.methods.base import Method, label_smoothing_option
from mulki.stages.pairs import contrastive_loss


class Finetune(Method):
    """Continual fine-tuning: ``CE(s u w^T, y)`` with label smoothing."""

    name = "finetune"
    summary = "plain fine-tuning on each task in turn"
    options: Options

    @dataclass(frozen=True)
    class Options(Method.Options):
        label_smoothing: float = label_smoothing_option()

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        return {
            "ce_loss": prototype_cross_entropy(
                student.image_text(), target, label_smoothing=self.options.label_smoothing
            )
        }

    def pair_losses(
        self, student: Features, teachers: tuple[Features, ...], distinct: Tensor | None
    ) -> dict[str, Tensor]:
        return {"contrastive_loss": contrastive_loss(student, distinct)}
