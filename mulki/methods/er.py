"""er: experience replay, a small buffer of images of earlier tasks that are shown again.

    L = CE_ls(s u w^T, y) + c CE_ls(s r v^T, z)

u are features of the batch and w of the texts of the task's C classes, as in `finetune`; r are
features of R images from the buffer, z their classes, and v the texts of all classes so far: those
of the task and of the earlier ones. A new image is classified among the classes of its task alone,
one of the buffer among all: the asymmetry of ER-ACE (Caccia et al., ICLR 2022, arXiv 2104.05025),
which keeps the first images of a new class from pushing all old classes away.

The buffer holds `buffer_size` images of all earlier tasks together: equally many of each class
(`balanced`), or a reservoir, in which each image so far is equally likely to be (Chaudhry et al.,
arXiv 1902.10486). It is chosen anew at the start of each task from the training images themselves,
so nothing is copied, and those of earlier tasks have to stay where they are.

What differs: in the papers a stream of images passes by once and the buffer changes with every
batch; here a task is known as a whole, as for every method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mulki.choices.options import option
from mulki.clip.features import Features
from mulki.functional import prototype_cross_entropy
from mulki.methods.base import ClassLoss, Needs, Replay


class ER(ClassLoss):
    """Cross-entropy on the task's images, and on some images of earlier tasks."""

    name = "er"
    summary = "experience replay: fine-tuning with a buffer of images of earlier tasks"
    options: Options

    @dataclass(frozen=True)
    class Options(ClassLoss.Options):
        buffer_size: int = option(500, "images of all earlier tasks that are kept", low=1)
        buffer: Literal["balanced", "reservoir"] = option(
            "balanced", "which ones: equally many of each class, or of all images by chance"
        )
        replay_batch_size: int | None = option(
            None, "kept images per step and process; --batch-size if left out", low=1
        )
        replay_weight: float = option(1.0, "coefficient of the cross-entropy of kept images", low=0)

    def __init__(self, options: Options):
        super().__init__(options)
        replay = Replay(options.buffer_size, options.buffer, options.replay_batch_size)
        self.needs = Needs(replay=replay)

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        o, terms = self.options, super().losses(student, teachers, target)
        if student.replay is not None:
            assert student.replay_target is not None
            terms["replay_loss"] = o.replay_weight * prototype_cross_entropy(
                student.replay.image_text(),
                student.replay_target,
                label_smoothing=o.label_smoothing,
            )
        return terms
