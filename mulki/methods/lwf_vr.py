"""lwf_vr: Learning without Forgetting via Replayed Vocabulary (Ding et al., arXiv 2207.09248).

    L = CE_ls(s u w^T, y) + c T^2 KL(softmax(s' u' a'^T / T) || softmax(s u a^T / T))

with u image features, w class texts, a the texts of a vocabulary, and s the logit scale; those of
the model after the previous task have a prime. The student encodes the words itself, so its text
tower learns from this term too. The defaults of c and T are those of the authors' code.

What differs from it: there the words are 100 random sequences of 10 byte-pair tokens, drawn anew at
every step. Here they are the words of the run's vocabulary (``--vocabulary``), so that this method
and MulKI with a vocabulary are compared on the same input; where the student's text tower trains,
some of them are drawn at every step (``--anchors-per-step``). With an output for the classes of all
tasks, their code also distils over the classes of earlier tasks; here each task has its own
classes, and nothing is kept of earlier ones. The benchmark of ZSCL names another loss LwF-VR: that
of ZSCL with the task's own images and 1000 random sequences, and T = 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mulki.choices.options import option
from mulki.clip.features import Features
from mulki.functional import teacher_kl
from mulki.methods.base import PREVIOUS, VOCABULARY, ClassLoss, Needs
from mulki.similarity import Similarity


class LwFVR(ClassLoss):
    """Cross-entropy, and the previous model's answers over the words of a vocabulary."""

    name = "lwf_vr"
    summary = "LwF over a vocabulary: distillation of images against words"
    options: Options
    needs = Needs(teachers=(PREVIOUS,), anchors=(VOCABULARY,), student_anchors=True)

    @dataclass(frozen=True)
    class Options(ClassLoss.Options):
        distill_weight: float = option(0.5, "coefficient of the distillation term", low=0)
        temperature: float = option(
            1.0, "softmax temperature of the distillation term", above=0, alias="--T"
        )

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        terms = super().losses(student, teachers, target)
        # None where every word is a class of the task, which the cross-entropy teaches.
        if student.vocabulary is None:
            return terms
        kl = teacher_kl(
            _images_to_words(student),
            [_images_to_words(teacher) for teacher in teachers],
            temperature=self.options.temperature,
        )
        return terms | {"distill_loss": self.options.distill_weight * kl}


def _images_to_words(model: Features) -> Similarity:
    assert model.vocabulary is not None
    return Similarity(model.images, model.vocabulary, model.scale)
