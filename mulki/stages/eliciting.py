"""Eliciting Ideas: prototypes align the modalities.

    L_align = 1/2 [CE(s p w^T, diagonal) + CE(s w p^T, diagonal)]
    L_proto = CE_ls(s u p^T, y)

with p [C, D] the student's visual prototypes, w [C, D] its class texts, u [B, D] the images of a
batch with classes y, s the logit scale.

Stated by the source (arXiv 2411.06764 and its published summaries): before each task the original
model encodes the training images, class means are the initial prototypes, they are updated while
the task is learned, and a symmetric contrastive loss raises the similarity of prototypes and texts.
Our choice: the form of that loss (CLIP's), and the update (`mulki.clip.Prototypes`). With an
exponential average of batch class means the gradient of L_align reaches the texts alone; with the
update "batch" it reaches the images too, and with learnable prototypes the prototypes. L_proto, the
cross-entropy of images against prototypes, is ours. docs/method.md has what the stage gave.
"""

from __future__ import annotations

from torch import Tensor

from mulki.clip.features import Features
from mulki.functional import clip_contrastive, prototype_cross_entropy
from mulki.similarity import Similarity


def alignment_loss(student: Features) -> Tensor:
    """L_align, the mean over C classes.

    Raises:
        ValueError: the student has no prototypes.
    """
    return clip_contrastive(_prototypes(student), student.texts, student.scale)


def prototype_loss(student: Features, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """L_proto, the mean over the batch.

    Args:
        target: [B] int64.
        label_smoothing: in [0, 1].

    Raises:
        ValueError: the student has no prototypes.
    """
    similarity = Similarity(student.images, _prototypes(student), student.scale)
    return prototype_cross_entropy(similarity, target, label_smoothing=label_smoothing)


def _prototypes(student: Features) -> Tensor:
    if student.prototypes is None:
        raise ValueError("student: has no prototypes, wanted [C, D]; see mulki.clip.prototypes")
    return student.prototypes
