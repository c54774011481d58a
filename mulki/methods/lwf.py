"""lwf: Learning without Forgetting (Li and Hoiem, arXiv 1606.09282) for a model with a text tower.

    L = CE_ls(s u w^T, y) + c T^2 KL(softmax(z' / T) || softmax(z / T))

z' are the logits of the model after the previous task, for the current images and the current
class texts. The original method keeps the output of a classifier head for each old task. A model
with a text tower has no such heads, so here the previous model's answers to the new images are
kept, as in the benchmark of ZSCL.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mulki.choices.options import option
from mulki.clip.features import Features
from mulki.functional import teacher_kl
from mulki.methods.base import PREVIOUS, ClassLoss, Needs


class LwF(ClassLoss):
    """Cross-entropy and one teacher, the model after the previous task."""

    name = "lwf"
    summary = "Learning without Forgetting: distillation from the previous model"
    options: Options
    needs = Needs(teachers=(PREVIOUS,))

    @dataclass(frozen=True)
    class Options(ClassLoss.Options):
        distill_weight: float = option(1.0, "coefficient of the distillation term", low=0)
        temperature: float = option(
            2.0, "softmax temperature of the distillation term", above=0, alias="--T"
        )

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        kl = teacher_kl(
            student.image_text(),
            [teacher.image_text() for teacher in teachers],
            temperature=self.options.temperature,
        )
        terms = super().losses(student, teachers, target)
        return terms | {"distill_loss": self.options.distill_weight * kl}
