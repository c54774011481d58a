"""zscl: ZSCL (Zheng et al., ICCV 2023, arXiv 2303.06628).

    L = CE_ls(s u w^T, y) + c1 D(z', z) + c2 D(z'^T, z^T) + lambda |theta - theta_start|^2
    D(z', z) = T^2 mean over rows of KL(softmax(z' / T) || softmax(z / T))
    z' = s r' t'^T,   z = s r t'^T

with r features of the R images of a reference batch and t of its captions; those of the teacher
have a prime. Both matrices have the *teacher's* captions, so the student's text tower learns from
the cross-entropy alone. The teacher is the original model. The weights after a task are the running
mean of those at its start and after every `we_every` steps (weight ensembling); lambda is the
coefficient of weight consolidation, a sum over all weights.

Source: the paper and its code, which give the defaults (T = 2, all coefficients 1, 100 steps), but
for their label smoothing of 0.2, which the preset zscl has.

What differs. D in the code is a cross-entropy, which is this KL and a constant. There the captions
are all sentences of a set; here they are the captions of the batch, so the rows of z are
distributions over R texts. The code takes a member of the running mean after steps 1, 101, ..., of
1001 steps, here it is after steps 100, 200, ...; and a task shorter than `we_every` keeps its last
weights. The paper's reference images are ImageNet's and its captions are of Conceptual Captions:
``--reference`` names such a set. With ``--reference current`` the images are the task's own and the
captions are words of the vocabulary, a setting of ours that needs no further image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mulki.choices.options import option
from mulki.clip.features import Features
from mulki.functional import teacher_kl
from mulki.methods.base import ClassLoss, Needs, TaskStart
from mulki.similarity import Similarity
from mulki.stages.connecting import Connections

Teacher = Literal["zero_shot", "previous"]


class ZSCL(ClassLoss):
    """One teacher on reference images, running mean of the weights, weight consolidation."""

    name = "zscl"
    summary = "ZSCL: distillation on a reference set, averaged and anchored weights"
    options: Options

    @dataclass(frozen=True)
    class Options(ClassLoss.Options):
        image_loss: float = option(
            1.0, "coefficient of the divergence over captions, per reference image", low=0
        )
        text_loss: float = option(
            1.0, "coefficient of the divergence over reference images, per caption", low=0
        )
        temperature: float = option(
            2.0, "softmax temperature of both divergences", above=0, alias="--T"
        )
        teacher: Teacher = option("zero_shot", "the original model, or the previous one")
        we_every: int = option(
            100, "steps between two members of the running mean; 0: none", low=0, alias="--avg-freq"
        )
        l2: float = option(
            1.0, "coefficient of the squared distance from the previous weights", low=0
        )

    def __init__(self, options: Options):
        super().__init__(options)
        self.needs = Needs(
            teachers=(options.teacher,),
            teacher_images=False,
            reference=True,
            student_captions=False,
        )

    @property
    def averages(self) -> bool:
        return self.options.we_every > 0

    def start_task(self, task: TaskStart) -> None:
        self._connections = Connections(
            task.weights, every=self.options.we_every, l2=self.options.l2
        )

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        o = self.options
        assert student.reference is not None and teachers[0].reference is not None
        theirs = teachers[0].reference.image_text()
        ours = Similarity(student.reference.images, theirs.prototypes, student.scale)
        return super().losses(student, teachers, target) | {
            "image_loss": o.image_loss * teacher_kl(ours, [theirs], temperature=o.temperature),
            "text_loss": o.text_loss * teacher_kl(ours.T, [theirs.T], temperature=o.temperature),
        }
