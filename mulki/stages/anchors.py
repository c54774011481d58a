"""Text anchors: the relations of Adding New Ideas held over texts beyond the task's classes too.

    image_anchor  s u [w; a]^T   [B, C + A]
    text_anchor   s w a^T        [C, A]

with u image features, w the features of the C class texts, a those of A anchors and s the logit
scale. As in `adding`, the student's matrix is kept near each teacher's by ``teacher_kl``. There are
two groups of anchors: the classes of earlier tasks (``seen``) and the words of a vocabulary.
Without anchors the teachers are asked about the classes of the current task alone, and nothing
holds the images' place among all other texts, which is what zero-shot ability depends on.

Source: LwF-VR (Ding et al., arXiv 2207.09248) distils over the words of a vocabulary, ZSCL (Zheng
et al., ICCV 2023) over the captions of a reference set. A list of words is no extra data in the
sense of MulKI's abstract, since it has no image and nothing is stored for a task, but it is more
than the tasks bring; results say who used one.

Our choice: classes and anchors share one softmax. The student's images may be held against each
teacher's own texts, as in ZSCL, so that these are constant and cost no encoding; or against the
student's, so that its text projection learns as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from mulki.clip.features import Features
from mulki.functional import teacher_kl
from mulki.similarity import Similarity

Rows = Literal["images", "texts"]
TextsOf = Literal["teacher", "student"]
WeightsBy = Literal["gate", "group"]

ROWS: Mapping[str, Rows] = MappingProxyType({"image_anchor": "images", "text_anchor": "texts"})


def present(teachers: Sequence[Features]) -> bool:
    """Whether the teachers have anchors; at a first task there are no classes of earlier ones."""
    return teachers[0].anchored is not None


def text_anchor_kl(
    student: Features,
    teachers: Sequence[Features],
    weights: Tensor,
    *,
    rows: Rows = "images",
    anchor_texts: TextsOf = "teacher",
    anchor_weights: WeightsBy = "gate",
    temperature: float = 2.0,
    scale_by_t2: bool = True,
) -> Tensor:
    """Weighted KL of the teachers' relation to the anchors from the student's, the mean over rows.

    Args:
        student: has the anchors itself if `anchor_texts` is "student".
        teachers: each with the same anchors; of two, the first is the original model and the last
            the previous one.
        weights: [rows, K], a weight per row and teacher.
        rows: "images" for image_anchor, "texts" for text_anchor.
        anchor_texts: whose texts the student is held against.
        anchor_weights: "gate": one relation over both groups, under `weights`. "group": a relation
            for each group, the previous model alone for the classes of earlier tasks and the
            original model alone for the vocabulary; two groups count half
            each of the sum of `weights`.

    Raises:
        ValueError: a model lacks the anchors that it needs, or the teachers' width is not its
            own while it is held against their texts.
    """

    def divergence(
        student: Features, teachers: Sequence[Features], weights: Tensor, columns: Features
    ) -> Tensor:
        return teacher_kl(
            _similarity(student, columns, rows),
            [_similarity(teacher, teacher, rows) for teacher in teachers],
            weights=weights,
            temperature=temperature,
            scale_by_t2=scale_by_t2,
        )

    losses = []
    for of_student, of_teachers, of_rows in _parts(student, teachers, weights, anchor_weights):
        if anchor_texts == "student":
            losses.append(divergence(of_student, of_teachers, of_rows, of_student))
        else:
            losses += [
                divergence(of_student, [teacher], of_rows[:, k : k + 1], teacher)
                for k, teacher in enumerate(of_teachers)
            ]
    return torch.stack(losses).sum()


def _parts(
    student: Features, teachers: Sequence[Features], weights: Tensor, anchor_weights: WeightsBy
) -> list[tuple[Features, Sequence[Features], Tensor]]:
    # The relations: student and teachers with the anchors of one relation, and its weights.
    if anchor_weights == "gate":
        return [(student, teachers, weights)]
    original, previous = teachers[0], teachers[-1]
    parts: list[tuple[Features, Sequence[Features]]] = []
    if previous.seen is not None:
        parts.append((_only_seen(student), [_only_seen(previous)]))
    if original.vocabulary is not None:
        parts.append((_only_vocabulary(student), [_only_vocabulary(original)]))
    equal = weights.sum(dim=1, keepdim=True) / len(parts)
    return [(of_student, of_teachers, equal) for of_student, of_teachers in parts]


def _only_seen(model: Features) -> Features:
    if model.anchored is None:
        return model
    return replace(model, anchored=model.anchored[: len(model.texts) + model.num_seen])


def _only_vocabulary(model: Features) -> Features:
    if model.num_seen == 0 or model.vocabulary is None:
        return model
    return replace(model, anchored=torch.cat([model.texts, model.vocabulary]), num_seen=0)


def _similarity(model: Features, columns: Features, rows: Rows) -> Similarity:
    if columns.anchored is None:
        raise ValueError(
            "student, teachers: one has no anchors, wanted the same in all; without the student's "
            "pass anchor_texts='teacher'"
        )
    of_rows = model.images if rows == "images" else model.texts
    if columns.anchored.shape[1] != of_rows.shape[1]:
        raise ValueError(
            f"teachers: got texts of width {columns.anchored.shape[1]}, wanted the student's, "
            f"{of_rows.shape[1]}; pass anchor_texts='student'"
        )
    first = 0 if rows == "images" else len(columns.texts)
    return Similarity(of_rows, columns.anchored[first:], model.scale)
