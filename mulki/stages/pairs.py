"""The stages for images with captions, where there are no classes.

    L = L_con + c sum_b sum_m 1/2 [w_bm KL_bm(images) + w'_bm KL_bm(captions)] / B
              + sum_b sum_m f_m w_bm |u_b - u_b^m|^2 / B
    L_con = 1/2 [CE(s u w^T, diagonal) + CE(s w u^T, diagonal)]

with u and w the features of the B images of a batch and of their captions, row by row. KL_bm is
that of a teacher's softmax over the captions of the batch, given image b, from the student's; for
captions, over its images. c is the option `image_caption`; f_m is `feature`, or `feature_original`
for the original model. The weights are those of the gate, whose label is a row's own pair
(Distinguishing Ideas). Prototypes are means over classes, so what is built on them is left out
(Eliciting Ideas, and their part of Adding New Ideas); the weights of the model are connected as
they are for classes. All is held on the task's own images, whatever `hold_on` says.

The paper's experiments are on classes, as far as is public; so all of this is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mulki.clip.features import Features
from mulki.functional import clip_contrastive
from mulki.ops import pair_kl
from mulki.ops.gates import Weighting
from mulki.stages.adding import image_text


def contrastive_loss(student: Features, distinct: Tensor | None) -> Tensor:
    """The symmetric contrastive loss of CLIP on a batch of pairs.

    Args:
        student: features of B images and of their B captions.
        distinct: the rows that take part, [n] int64 on the CPU; None for all. Where an image or a
            caption comes twice in a batch, one of its pairs would be a wrong negative of the other.
    """
    images, texts = student.images, student.texts
    if distinct is not None:
        rows = distinct.to(images.device)
        images, texts = images[rows], texts[rows]
    return clip_contrastive(images, texts, student.scale)


def gated_relation(
    student: Features,
    teachers: Sequence[Features],
    weighting: Weighting,
    temperature: float,
    scale_by_t2: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of the relation between images and captions, in both directions under the gate.

    Args:
        student: features of B images and of their B captions; gradients flow to them.
        teachers: the same of K teachers.
        weighting: the gate.
        temperature, scale_by_t2: see `mulki.functional.pair_teacher_kl`.

    Returns:
        The mean loss over the pairs, and the weights of the images [B, K], whose rows sum to 1.
    """
    options = temperature, scale_by_t2, None, weighting, "mean"
    others = [image_text(teacher) for teacher in teachers]
    loss, _, weights, *_ = pair_kl.loss(image_text(student), others, *options)
    return loss, weights[0]
