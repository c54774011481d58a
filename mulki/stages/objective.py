"""The objective: cross-entropy plus each stage's terms, every one with its own coefficient.

    L = CE_ls(s u w^T, y) + a L_align + b L_proto
        + sum_r c_r KL_r(teachers || student; w)  over the four relations r and those to anchors
        + sum_m f_m w_m |u - u^m|^2

The relations of images and the distance of features are held on the images of the task, on those of
a reference set, or on both; everything else is of the task.

See `eliciting`, `adding`, `anchors` and `distinguishing` for the terms. The paper's coefficients
are not public: the defaults here are those of a pilot on six small tasks, but for the gate and the
label smoothing. The method `mulki` has others, which were chosen on the bundled tasks
(benchmarks/embedded).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mulki.clip.features import Features
from mulki.functional import prototype_cross_entropy
from mulki.ops import checks
from mulki.ops.gates import Weighting
from mulki.representation import arguments_shown
from mulki.stages import adding, anchors, distinguishing, eliciting, pairs

HoldOn = Literal["made", "task", "both"]


class MulKILoss(nn.Module):
    """The whole objective of MulKI on one batch of features, reimplemented from its description.

    A pure function of features: it holds hyper-parameters alone, so it fits any training loop. A
    coefficient of 0 switches its term off, and the term is then not computed.

    Args:
        temperature: T of the relations' softmax and of the gate.
        gate: how the teachers are weighted per sample, see `mulki.functional.teacher_kl`.
        gate_temperature: > 0, smaller is sharper.
        gate_entropy: a of the gate "blend", see `mulki.functional.teacher_kl`.
        gate_label: b of the gate "blend".
        label_smoothing: of the cross-entropy, in [0, 1].
        alignment: coefficient of the prototype-text alignment (Eliciting Ideas).
        prototype: coefficient of the cross-entropy of images against prototypes (Eliciting Ideas).
        image_text: coefficient of the relation of images to class texts (Adding New Ideas).
        image_image: of images to visual prototypes.
        text_image: of class texts to visual prototypes.
        text_text: of class texts to each other.
        image_anchor: of images to text anchors; without effect while the teachers' features have
            none.
        text_anchor: of class texts to text anchors, likewise.
        image_caption: of images to captions and back, the one relation of `pair_terms`.
        anchor_texts: whose texts, see `mulki.stages.anchors.text_anchor_kl`.
        anchor_weights: by what the teachers are weighted there.
        feature: coefficient of the squared distance of image features.
        feature_original: that of the distance from the first of two teachers, the original model;
            `feature` if None.
        hold_on: of which images the relations and the distance are: "task", those of
            `Features.images`; "made", those of `Features.reference`; or "both", the sum of the two.
            No target belongs to a reference image, so a gate that needs one is for "task" alone.
        scale_by_t2: multiply each KL by T^2.

    Raises:
        TypeError, ValueError: a coefficient is negative or not finite, or an argument is out of
            range or of the wrong type.

    Examples:
        >>> from torch.nn.functional import normalize
        >>> def features(width):
        ...     images, texts = normalize(torch.randn(8, width)), normalize(torch.randn(5, width))
        ...     return Features(images, texts, scale=100.0)
        >>> objective = MulKILoss(alignment=0, image_image=0, text_image=0)  # no prototypes here
        >>> target = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
        >>> terms = objective(
        ...     features(512), [features(512), features(512)], target, output_dict=True
        ... )
        >>> list(terms)
        ['ce_loss', 'image_text_loss', 'text_text_loss', 'feature_loss']
    """

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        gate: str = "uniform",
        gate_temperature: float = 1.0,
        gate_entropy: float | None = None,
        gate_label: float | None = None,
        label_smoothing: float = 0.0,
        alignment: float = 0.25,
        prototype: float = 0.0,
        image_text: float = 0.25,
        image_image: float = 0.25,
        text_image: float = 0.25,
        text_text: float = 0.25,
        image_anchor: float = 0.25,
        text_anchor: float = 0.0,
        image_caption: float = 0.25,
        anchor_texts: anchors.TextsOf = "teacher",
        anchor_weights: anchors.WeightsBy = "gate",
        feature: float = 1.0,
        feature_original: float | None = None,
        hold_on: HoldOn = "task",
        scale_by_t2: bool = True,
    ):
        super().__init__()
        self.relations = {
            "image_text": image_text,
            "image_image": image_image,
            "text_image": text_image,
            "text_text": text_text,
        }
        self.anchors = {"image_anchor": image_anchor, "text_anchor": text_anchor}
        self.alignment = alignment
        self.prototype = prototype
        # Of the original model, and of any other.
        self.feature = feature if feature_original is None else feature_original, feature
        self.image_caption = image_caption
        others = {
            "alignment": alignment,
            "prototype": prototype,
            "image_caption": image_caption,
            "feature": feature,
        }
        if feature_original is not None:
            others["feature_original"] = feature_original
        for name, value in (self.relations | self.anchors | others).items():
            checks.real(name, value)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: got {value}, wanted a coefficient of 0 or more")
        checks.temperature("temperature", temperature)
        checks.temperature("gate_temperature", gate_temperature)
        checks.fraction("label_smoothing", label_smoothing)
        checks.choice("hold_on", hold_on, get_args(HoldOn))
        checks.choice("anchor_texts", anchor_texts, get_args(anchors.TextsOf))
        checks.choice("anchor_weights", anchor_weights, get_args(anchors.WeightsBy))
        self.weighting = Weighting.of(gate, gate_temperature, gate_entropy, gate_label)
        if hold_on != "task" and self.weighting.uses_target:
            raise ValueError(
                f'gate: got "{gate}", which looks at the target, with hold_on="{hold_on}"; a made '
                'image has none: use "uniform", "confidence" or "discrepancy", or hold_on="task"'
            )
        self.hold_on: HoldOn = hold_on
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.scale_by_t2 = scale_by_t2
        self.anchor_texts = anchor_texts
        self.anchor_weights = anchor_weights

    def extra_repr(self) -> str:
        original, feature = self.feature
        return arguments_shown(
            self,
            feature=feature,
            feature_original=None if original == feature else original,
            **self.relations,
            **self.anchors,
            **self.weighting.arguments,
        )

    @property
    def needs_teachers(self) -> bool:
        """Whether any term looks at a teacher."""
        return bool(any(self.feature) or self.needs_anchors or any(self.relations.values()))

    @property
    def needs_reference(self) -> bool:
        """Whether any term looks at images of a reference set."""
        of_images = [self.relations[name] for name in adding.IMAGE_ROWS]
        held = any((*of_images, self.anchors["image_anchor"], *self.feature))
        return self.hold_on != "task" and held

    @property
    def needs_teacher_images(self) -> bool:
        """Whether any term looks at a teacher's images of the task, or at their class means."""
        prototypes = any(self.relations[name] for name in adding.NEED_PROTOTYPES)
        return self.hold_on != "made" or prototypes

    @property
    def needs_caption_teachers(self) -> bool:
        """Whether any term of `pair_terms` looks at a teacher."""
        return bool(any(self.feature) or self.image_caption)

    @property
    def needs_anchors(self) -> bool:
        """Whether any term looks at text anchors, where there are any."""
        return any(self.anchors.values())

    @property
    def needs_prototypes(self) -> bool:
        """Whether any term looks at prototypes."""
        relations = any(self.relations[name] for name in adding.NEED_PROTOTYPES)
        return bool(self.alignment or self.prototype or relations)

    def forward(
        self,
        student: Features,
        teachers: Sequence[Features],
        target: Tensor,
        *,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The total, or its weighted terms by name (each ends in ``_loss``; they sum to the total).

        Args:
            student: features of the model that learns; gradients flow to all of them.
            teachers: features of the frozen teachers, usually (original, previous).
            target: [B] int64 classes of the images.

        Raises:
            TypeError, ValueError: from the functions of `mulki.functional`, or when a term that is
                switched on lacks its teachers or prototypes.
        """
        terms, _ = self.terms(student, teachers, target)
        return terms if output_dict else torch.stack(list(terms.values())).sum()

    def terms(
        self, student: Features, teachers: Sequence[Features], target: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The weighted terms by name, as `forward` returns them, and how teachers were weighted.

        Args:
            student, teachers, target: as of `forward`, with the same errors.

        Returns:
            The terms, and the weights [B, K] of K teachers per sample, constants for autograd; None
            where no term looks at a teacher.
        """
        _check_features("student", student)
        if not isinstance(teachers, Sequence):
            raise TypeError(
                f"teachers: got {type(teachers).__name__}, wanted a sequence of Features; put a "
                "single teacher in a list"
            )
        for k, teacher in enumerate(teachers):
            _check_teacher(f"teachers[{k}]", teacher, student)
        if self.needs_teachers and not teachers:
            raise ValueError("teachers: got none, wanted at least one for the terms switched on")
        if self.needs_anchors:
            _check_anchored(teachers)
        terms = {
            "ce_loss": prototype_cross_entropy(
                student.image_text(), target, label_smoothing=self.label_smoothing
            )
        }
        if self.alignment:
            terms["alignment_loss"] = self.alignment * eliciting.alignment_loss(student)
        if self.prototype:
            terms["prototype_loss"] = self.prototype * eliciting.prototype_loss(
                student, target, self.label_smoothing
            )
        if not self.needs_teachers:
            return terms, None
        of_teachers, weights = self._teacher_terms(student, teachers, target)
        return terms | of_teachers, weights

    def pair_terms(
        self, student: Features, teachers: Sequence[Features], distinct: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """`terms` of a batch of images with captions, see `mulki.stages.pairs`.

        `image_caption` is the coefficient of the relation, in both directions, `feature` and
        `feature_original` are those of the distance of image features; the other coefficients have
        no say.

        Args:
            student: features of B images and, as its texts, of their B captions.
            teachers: the same of K teachers.
            distinct: see `mulki.stages.pairs.contrastive_loss`.
        """
        terms = {"contrastive_loss": pairs.contrastive_loss(student, distinct)}
        if not self.needs_caption_teachers:
            return terms, None
        if self.image_caption:
            loss, weights = pairs.gated_relation(
                student, teachers, self.weighting, self.temperature, self.scale_by_t2
            )
            terms["image_caption_loss"] = self.image_caption * loss
        else:
            own = torch.arange(student.images.shape[0], device=student.images.device)
            weights = distinguishing.sample_weights(
                student, teachers, own, self.weighting, self.temperature
            )
        if any(self.feature):
            terms["feature_loss"] = self._feature_loss(student, teachers, weights)
        return terms, weights

    def _teacher_terms(
        self, student: Features, teachers: Sequence[Features], target: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        terms: dict[str, Tensor] = {}
        all_weights = []
        if self.hold_on != "made":
            terms, weights = self._image_terms(student, teachers, target)
            per_class = distinguishing.class_weights(weights, target, student.texts.shape[0])
            all_weights.append(weights)
        if self.needs_reference:
            held = adding.on_reference(student), [adding.on_reference(t) for t in teachers]
            of_reference, weights = self._image_terms(*held, None)
            for name, term in of_reference.items():
                terms[name] = terms[name] + term if name in terms else term
            all_weights.append(weights)
        if self.hold_on == "made":
            shape = student.texts.shape[0], len(teachers)
            per_class = student.texts.new_full(shape, 1 / len(teachers))
        of_texts = "text_image", "text_text", "text_anchor"
        terms |= self._weighted_terms(of_texts, student, teachers, per_class)
        order = [f"{name}_loss" for name in (*self.relations, *self.anchors, "feature")]
        in_order = {name: terms[name] for name in order if name in terms}
        return in_order, torch.cat(all_weights) if all_weights else None

    def _image_terms(
        self, student: Features, teachers: Sequence[Features], target: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        # The terms with a row per image, and the weights of the teachers [B, K].
        softmax = self.temperature, self.scale_by_t2
        batch = student, teachers, target
        terms = {}
        if self.relations["image_text"]:
            loss, weights = distinguishing.gated_relation(*batch, self.weighting, *softmax)
            terms["image_text_loss"] = self.relations["image_text"] * loss
        else:
            weights = distinguishing.sample_weights(*batch, self.weighting, self.temperature)
        of_images = "image_image", "image_anchor"
        terms |= self._weighted_terms(of_images, student, teachers, weights)
        if any(self.feature):
            terms["feature_loss"] = self._feature_loss(student, teachers, weights)
        return terms, weights

    def _weighted_terms(
        self,
        names: Sequence[str],
        student: Features,
        teachers: Sequence[Features],
        weights: Tensor,
    ) -> dict[str, Tensor]:
        # Those of these relations that are switched on, under weights for each of their rows. A
        # coefficient in the weights spares the gradients a multiplication.
        terms = {}
        for name in names:
            if self.relations.get(name):
                terms[f"{name}_loss"] = adding.relation_loss(
                    adding.RELATIONS[name],
                    student,
                    teachers,
                    self.relations[name] * weights,
                    self.temperature,
                    self.scale_by_t2,
                )
            elif self.anchors.get(name) and anchors.present(teachers):
                terms[f"{name}_loss"] = anchors.text_anchor_kl(
                    student,
                    teachers,
                    self.anchors[name] * weights,
                    rows=anchors.ROWS[name],
                    anchor_texts=self.anchor_texts,
                    anchor_weights=self.anchor_weights,
                    temperature=self.temperature,
                    scale_by_t2=self.scale_by_t2,
                )
        return terms

    def _feature_loss(
        self, student: Features, teachers: Sequence[Features], weights: Tensor
    ) -> Tensor:
        original, other = self.feature
        if original != other:
            if len(teachers) != 2:
                raise ValueError(
                    f"teachers: got {len(teachers)} with a feature_original of its own, wanted the "
                    "original and the previous model; leave feature_original out"
                )
            # No tensor of the two numbers, for which the host would wait for a GPU.
            weights = torch.stack([original * weights[:, 0], other * weights[:, 1]], dim=1)
        else:
            weights = other * weights
        return adding.feature_loss(student, teachers, weights)


def _check_teacher(name: str, teacher: Features, student: Features) -> None:
    _check_features(name, teacher)
    parts = (teacher.images, teacher.texts, teacher.prototypes, teacher.scale)
    if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
        raise ValueError(
            f"{name}: requires grad, but no gradient flows to a teacher; compute its features "
            f"under torch.no_grad()"
        )
    dtypes = teacher.images.dtype, student.images.dtype
    if dtypes[0] != dtypes[1] and torch.float64 in dtypes:
        raise TypeError(
            f"{name}: got dtype {dtypes[0]}, wanted {dtypes[1]} as the student; cast one to the "
            f"other"
        )


def _check_anchored(teachers: Sequence[Features]) -> None:
    found = [None if t.anchored is None else (len(t.anchored), t.num_seen) for t in teachers]
    if len(set(found)) > 1:
        raise ValueError(
            f"teachers: got anchored of {found} rows and num_seen, wanted the same texts of each"
        )
    for k, teacher in enumerate(teachers):
        if teacher.anchored is None:
            continue
        least = len(teacher.texts) + teacher.num_seen
        if len(teacher.anchored) < least:
            raise ValueError(
                f"teachers[{k}].anchored: got {len(teacher.anchored)} rows, wanted at least {least}"
                f": {len(teacher.texts)} of its texts and {teacher.num_seen} of num_seen"
            )


def _check_features(name: str, value: object) -> None:
    if not isinstance(value, Features):
        raise TypeError(
            f"{name}: got {type(value).__name__}, wanted mulki.clip.Features; build them with "
            f"Features(images, texts, scale, prototypes)"
        )
    for field in ("images", "texts", "prototypes"):
        matrix = getattr(value, field)
        if matrix is not None or field != "prototypes":
            checks.is_tensor(f"{name}.{field}", matrix)
    prototypes, texts = value.prototypes, value.texts
    if prototypes is not None and prototypes.shape[:1] != texts.shape[:1]:
        raise ValueError(
            f"{name}.prototypes: got shape {list(prototypes.shape)}, wanted a row for each of "
            f"{name}.texts, which have {list(texts.shape)}"
        )
    checks.scalar(f"{name}.scale", value.scale, value.images.device)
