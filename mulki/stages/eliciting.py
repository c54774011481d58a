"""Eliciting Ideas: prototypes align the modalities.

    L_align = 1/2 [CE(s p w^T, diagonal) + CE(s w p^T, diagonal)]

with p [C, D] the student's visual prototypes, w [C, D] its class texts, s its logit scale.

Stated by the source (arXiv 2411.06764 and its published summaries): before each task the original
model encodes the training images, class means are the initial prototypes, they are updated while
the task is learned, and a symmetric contrastive loss raises the similarity of prototypes and texts.
Our choice: the form of that loss (CLIP's), and the update (an exponential average of the student's
batch class means, `mulki.prototypes.Prototypes`), so that with averaged prototypes the gradient
reaches the texts alone, and with learnable ones the prototypes too.
"""

from __future__ import annotations

from torch import Tensor

from mulki.features import Features
from mulki.functional import clip_contrastive


def alignment_loss(student: Features) -> Tensor:
    """Symmetric contrastive loss of prototypes and texts, the mean over C classes.

    Raises:
        ValueError: the student has no prototypes.
    """
    if student.prototypes is None:
        raise ValueError("student: has no prototypes, wanted [C, D]; see mulki.prototypes")
    return clip_contrastive(student.prototypes, student.texts, student.scale)
