"""Adding New Ideas: fine-grained relations inside and between the modalities carry knowledge.

Each relation is a similarity matrix of one model, and the student's is kept near each teacher's by
``teacher_kl`` (rows are distributions over classes):

    image_text   s u w^T   [B, C]    inter-modal, the class logits
    image_image  s u p^T   [B, C]    intra-modal, images to visual prototypes
    text_image   s w p^T   [C, C]    inter-modal, class texts to visual prototypes
    text_text    s w w^T   [C, C]    intra-modal, class texts to each other

and, level with them, feature distance ``|u - u^m|^2`` for models of one width. Every model uses its
own features, prototypes and scale. The images may be those of a reference set: then the task's own
images teach the student alone. By default the method `mulki` has of these text_text and the feature
distance, which is held on images made of the task's own.

Stated by the source (arXiv 2411.06764 and its published summaries): distillation on several levels
(features, inter-modality and intra-modality relations built with prototypes) from two teachers.
Our choice: which four relations, forward KL with T = 2 and the T^2 factor (as ZSCL does for
image-text), and the squared distance for features (as Select-and-Distill does).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from mulki.clip.features import Features
from mulki.ops import teacher_kl
from mulki.ops.gates import Weighting
from mulki.ops.logits import Operands

UNIFORM = Weighting.of("uniform")  # where weights are given

Relation = Callable[[Features], Operands]


def _prototypes(model: Features) -> Tensor:
    if model.prototypes is None:
        raise ValueError("prototypes: got None, wanted [C, D] for a relation that is built on them")
    return model.prototypes


def image_text(model: Features) -> Operands:
    """Images to class texts [B, C]."""
    return model.images, model.texts, model.scale


def image_image(model: Features) -> Operands:
    """Images to visual prototypes [B, C]."""
    return model.images, _prototypes(model), model.scale


def text_image(model: Features) -> Operands:
    """Class texts to visual prototypes [C, C]."""
    return model.texts, _prototypes(model), model.scale


def text_text(model: Features) -> Operands:
    """Class texts to each other [C, C]."""
    return model.texts, model.texts, model.scale


RELATIONS: Mapping[str, Relation] = MappingProxyType(
    {
        "image_text": image_text,
        "image_image": image_image,
        "text_image": text_image,
        "text_text": text_text,
    }
)
IMAGE_ROWS = frozenset({"image_text", "image_image"})  # a row per image; the others per class
NEED_PROTOTYPES = frozenset({"image_image", "text_image"})


def on_reference(model: Features) -> Features:
    """The features of a model with the images of its reference set in place of the task's.

    Raises:
        ValueError: it has none.
    """
    if model.reference is None:
        raise ValueError(
            'student, teachers: got features without a reference set; pass it, or hold_on="task"'
        )
    return replace(model, images=model.reference.images)


def relation_loss(
    relation: Relation,
    student: Features,
    teachers: Sequence[Features],
    weights: Tensor,
    temperature: float,
    scale_by_t2: bool,
) -> Tensor:
    """Weighted KL of the teachers' relation from the student's, the mean over its rows.

    Args:
        weights: [rows, K], a weight per row and teacher.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    # A step has several relations, so they take the operator and not its checks of types.
    options = temperature, scale_by_t2, weights, UNIFORM, None, None, "mean", False
    return teacher_kl.loss(relation(student), [relation(each) for each in teachers], *options)[0]


def feature_loss(student: Features, teachers: Sequence[Features], weights: Tensor) -> Tensor:
    """``mean_b sum_k w_bk |u_b - u_b^k|^2``.

    Raises:
        ValueError: a teacher has other images or another width than the student.
    """
    for k, teacher in enumerate(teachers):
        if teacher.images.shape != student.images.shape:
            raise ValueError(
                f"teachers[{k}]: got image features {list(teacher.images.shape)}, wanted "
                f"{list(student.images.shape)} as the student's"
                + ("; set the feature weight to 0" if len(teacher.images) == len(weights) else "")
            )
    # Few operations, above all few that have gradients: on a small batch each of them takes longer
    # than its arithmetic.
    weights = weights / weights.shape[0]
    others = torch.stack([teacher.images.detach() for teacher in teachers], dim=1)
    gaps = student.images.to(weights.dtype).unsqueeze(1) - others.to(weights.dtype)
    return (gaps.square() * weights.unsqueeze(2)).sum()
