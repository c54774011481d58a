"""mulki: the four stages together (arXiv 2411.06764, reimplemented from its description).

The objective is `mulki.stages.objective`; this file connects it to the tasks: prototypes are made
at a task's start and move with the student (Eliciting Ideas); a running mean of the weights, an
interpolation with the previous model or an anchor at it make the connections. Each stage can be
switched off alone:

    eliciting       off: no prototypes, so neither the alignment nor the relations built on them
    adding          off: no distillation, neither of relations nor of anchors nor of features
    distinguishing  off: both teachers count equally for every sample
    connecting      off: the last weights are the result, and there is no anchor

By default features and the relation of images to text anchors are held on images made of the
task's own, by the gate "discrepancy", which leaves the task's images to the cross-entropy. The
preset of the bundled model has the anchor of weights besides; the preset mulki-mtil has the
relations to prototypes and texts, on the task's images, the gate "label" and the running mean.

Of a task of captions `mulki.stages.pairs` is the objective, without prototypes and text anchors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.choices.options import option
from mulki.clip.features import Features
from mulki.clip.prototypes import Prototypes, Update
from mulki.errors import InputError
from mulki.methods.base import (
    PREVIOUS,
    SEEN,
    VOCABULARY,
    ZERO_SHOT,
    Method,
    Needs,
    TaskStart,
    label_smoothing_option,
)
from mulki.ops.gates import Weighting, gate_names
from mulki.stages.anchors import TextsOf, WeightsBy
from mulki.stages.connecting import Connections
from mulki.stages.objective import HoldOn, MulKILoss

Anchors = Literal["none", "seen", "vocabulary", "both"]
_GROUPS = {"none": (), "seen": (SEEN,), "vocabulary": (VOCABULARY,), "both": (SEEN, VOCABULARY)}
Teachers = Literal["both", "zero_shot", "previous"]
_TEACHERS = {
    "both": (ZERO_SHOT, PREVIOUS),
    "zero_shot": (ZERO_SHOT,),
    "previous": (PREVIOUS,),
}


class MulKI(Method):
    """Two teachers, prototypes, relations, gates and connected models."""

    name = "mulki"
    summary = "MulKI: dual-teacher distillation of prototype relations"
    options: Options

    @dataclass(frozen=True)
    class Options(Method.Options):
        eliciting: bool = option(
            True, "stage 1: prototypes and their alignment with the texts", of_classes=True
        )
        adding: bool = option(True, "stage 2: relations and features kept near the teachers")
        distinguishing: bool = option(True, "stage 3: teachers weighted by --gate")
        connecting: bool = option(True, "stage 4: --we-every, --alpha and --l2")
        label_smoothing: float = label_smoothing_option()
        temperature: float = option(
            2.0, "softmax temperature of relations and gate", above=0, alias="--T"
        )
        scale_by_t2: bool = option(True, "multiply each divergence by the temperature squared")
        prototype_update: Update = option(
            "ema", "how the student's prototypes move", of_classes=True
        )
        prototype_momentum: float = option(
            0.9, "momentum of the prototypes' average, in [0, 1]", low=0, high=1, of_classes=True
        )
        alignment: float = option(
            0.25, "coefficient of the prototype-text alignment", low=0, of_classes=True
        )
        prototype: float = option(
            0.0,
            "coefficient of the cross-entropy of images against prototypes",
            low=0,
            of_classes=True,
        )
        image_text: float = option(
            0.0, "coefficient of the image-to-text relation", low=0, of_classes=True
        )
        image_caption: float = option(
            0.25, "coefficient of the relation of images and captions, in tasks of captions", low=0
        )
        image_image: float = option(
            0.0, "coefficient of the image-to-prototype relation", low=0, of_classes=True
        )
        text_image: float = option(
            0.0, "coefficient of the text-to-prototype relation", low=0, of_classes=True
        )
        text_text: float = option(
            0.25, "coefficient of the text-to-text relation", low=0, of_classes=True
        )
        anchors: Anchors = option(
            "vocabulary",
            "texts beyond the task's classes: classes of earlier tasks, a vocabulary, both",
            of_classes=True,
        )
        image_anchor: float = option(
            0.5, "coefficient of the image-to-anchor relation", low=0, of_classes=True
        )
        text_anchor: float = option(
            0.0, "coefficient of the text-to-anchor relation", low=0, of_classes=True
        )
        anchor_texts: TextsOf = option(
            "teacher",
            "whose texts the student's images are held against in these relations",
            of_classes=True,
        )
        anchor_weights: WeightsBy = option(
            "gate",
            "gate: as all relations; group: the previous model for earlier classes, the original "
            "one for the vocabulary",
            of_classes=True,
        )
        feature: float = option(9.0, "coefficient of the distance of image features", low=0)
        feature_original: float | None = option(
            0.5,
            "coefficient of that distance from the original model; none: that of --feature",
            low=0,
        )
        hold_on: HoldOn = option(
            "made",
            "of which images the relations and the distance are: of those of --reference, of the "
            "task's own, or of both; of the task's own in tasks of captions",
        )
        teachers: Teachers = option(
            "both", "the original model, the previous one, or both; a gate needs both"
        )
        gate: str = option(
            "discrepancy", "how the two teachers are weighted per sample", choices=gate_names
        )
        gate_temperature: float = option(
            1.0, "temperature of the gate, smaller is sharper", above=0
        )
        gate_entropy: float | None = option(None, "weight of the entropy in the gate blend")
        gate_label: float | None = option(None, "weight of the label in the gate blend")
        we_every: int = option(
            0, "steps between two members of the running mean; 0: none", low=0, alias="--avg-freq"
        )
        alpha: float = option(
            1.0,
            "weight of the new parameters against the previous model's, (0, 1]",
            above=0,
            high=1,
            alias="--wise-ft-alpha",
        )
        l2: float = option(
            0.0, "coefficient of the squared distance from the previous weights", low=0
        )

    def __init__(self, options: Options):
        super().__init__(options)
        o = options
        try:
            weighting = Weighting.of(o.gate, o.gate_temperature, o.gate_entropy, o.gate_label)
        except (TypeError, ValueError) as error:
            argument, _, said = str(error).partition(":")
            raise InputError(f"--{argument.replace('_', '-')}:{said}") from None
        if not weighting.has_temperature and o.gate_temperature != 1:
            raise InputError(
                f"--gate-temperature: got {o.gate_temperature:g} with --gate {o.gate}, which has "
                "none; name another gate, or leave it out"
            )
        usual = type(o)()
        if o.gate not in ("uniform", usual.gate) and o.teachers != "both":
            raise InputError(
                f"--gate: got {o.gate} beside --teachers {o.teachers}, but a gate weighs two "
                "teachers; pass --gate uniform, or --teachers both"
            )
        if o.anchor_weights == "group" and o.teachers != "both":
            raise InputError(
                f"--anchor-weights: got group beside --teachers {o.teachers}, but a teacher for "
                "each group needs both; leave one of the two out"
            )
        if o.feature_original not in (None, usual.feature_original) and o.teachers == "previous":
            raise InputError(
                f"--feature-original: got {o.feature_original:g} beside --teachers previous; "
                "leave one of the two out"
            )
        own = o.feature_original is not None and o.teachers == "zero_shot"
        if own and o.feature != usual.feature:
            raise InputError(
                f"--feature: got {o.feature:g} beside --teachers zero_shot, whose coefficient is "
                "--feature-original; pass that one"
            )
        gated = o.distinguishing and o.teachers == "both"
        if gated and o.hold_on != "task" and weighting.uses_target:
            raise InputError(
                f"--gate: got {o.gate}, which looks at the label, with --hold-on {o.hold_on}, but "
                "a made image has none; pass --hold-on task, or another gate"
            )
        relations = o.adding
        visual = o.eliciting
        groups = _GROUPS[o.anchors]
        original = o.feature if o.feature_original is None else o.feature_original
        feature = original if o.teachers == "zero_shot" else o.feature
        self.objective = MulKILoss(
            temperature=o.temperature,
            gate=o.gate if gated else "uniform",
            gate_temperature=o.gate_temperature,
            gate_entropy=o.gate_entropy if gated else None,
            gate_label=o.gate_label if gated else None,
            label_smoothing=o.label_smoothing,
            alignment=o.alignment * visual,
            prototype=o.prototype * visual,
            image_text=o.image_text * relations,
            image_caption=o.image_caption * relations,
            image_image=o.image_image * relations * visual,
            text_image=o.text_image * relations * visual,
            text_text=o.text_text * relations,
            image_anchor=o.image_anchor * relations * bool(groups),
            text_anchor=o.text_anchor * relations * bool(groups),
            anchor_texts=o.anchor_texts,
            anchor_weights=o.anchor_weights,
            feature=feature * relations,
            feature_original=original * relations if o.teachers == "both" else None,
            hold_on=o.hold_on,
            scale_by_t2=o.scale_by_t2,
        )
        teachers = _TEACHERS[o.teachers]
        self.needs = Needs(
            teachers=teachers if self.objective.needs_teachers else (),
            caption_teachers=teachers if self.objective.needs_caption_teachers else (),
            teacher_images=self.objective.needs_teacher_images,
            prototypes=self.objective.needs_prototypes,
            reference=self.objective.needs_reference,
            captions=not self.objective.needs_reference,
            anchors=groups if self.objective.needs_anchors else (),
            student_anchors=self.objective.needs_anchors and o.anchor_texts == "student",
        )
        self._forget_task()

    def _forget_task(self) -> None:
        self._prototypes: Prototypes | None = None
        self._connections = None
        self._first: Tensor | None = None
        self._weights: Tensor | None = None

    @property
    def averages(self) -> bool:
        return self.options.connecting and self.options.we_every > 0

    @property
    def takes_mean(self) -> bool:
        return self.averages or (self.options.connecting and self.options.alpha < 1)

    def start_task(self, task: TaskStart) -> None:
        o = self.options
        self._forget_task()
        if task.prototypes is not None:
            self._prototypes = Prototypes(task.prototypes, o.prototype_update, o.prototype_momentum)
            self._first = task.prototypes
        if o.connecting:
            self._connections = Connections(task.weights, every=o.we_every, alpha=o.alpha, l2=o.l2)

    def prototypes(self) -> Tensor | None:
        return None if self._prototypes is None else self._prototypes()

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        if self._prototypes is not None:
            moved = self._prototypes.with_batch(student.images, target)
            student = replace(student, prototypes=moved)
        terms, self._weights = self.objective.terms(student, teachers, target)
        if self._prototypes is not None:
            # After the losses, so that a batch is compared with prototypes that it has not moved
            # itself. The update "batch" is the exception.
            self._prototypes.observe(student.images.detach(), target)
        return terms

    def pair_losses(
        self, student: Features, teachers: tuple[Features, ...], distinct: Tensor | None
    ) -> dict[str, Tensor]:
        terms, self._weights = self.objective.pair_terms(student, teachers, distinct)
        return terms

    @torch.no_grad()
    def watched(self) -> dict[str, Tensor]:
        found = {}
        if self._weights is not None:
            found["teacher_weights"] = self._weights
        if self._prototypes is not None and self._first is not None:
            moved = self._prototypes()
            found["prototype_drift"] = 1 - F.cosine_similarity(moved, self._first.to(moved))
        return found

    def end_task(self) -> None:
        super().end_task()
        self._forget_task()
