"""finetune: the loss of each task in turn, without any term against forgetting.

    L = CE_ls(s u w^T, y)                                       on images with classes
    L = 1/2 [CE(s u w^T, diagonal) + CE(s w u^T, diagonal)]     on images with captions

The logit scale s is fixed, as for every method (`VisionLanguageModel.lock`). Fine-tuning with a
fixed temperature is a strong baseline in LfI (CVPR 2026).
"""

from __future__ import annotations

from torch import Tensor

from mulki.clip.features import Features
from mulki.methods.base import ClassLoss
from mulki.stages.pairs import contrastive_loss


class Finetune(ClassLoss):
    """Continual fine-tuning: ``CE(s u w^T, y)`` with label smoothing."""

    name = "finetune"
    summary = "plain fine-tuning on each task in turn"

    def pair_losses(
        self, student: Features, teachers: tuple[Features, ...], distinct: Tensor | None
    ) -> dict[str, Tensor]:
        return {"contrastive_loss": contrastive_loss(student, distinct)}
