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
cross-entropy of images against prototypes, is ours.

Measured on the bundled tasks (order III, `python -m benchmarks.embedded.gradients --order III
--preset small --gate label --we-every 10 --l2 0` at commit 4935d05): the gradient of L_align has a
norm of 0.14 in the text tower, where that of the cross-entropy has 1.34, and none in the image
tower. So the stage hardly moves either tower. Without it Transfer, Average and Last change by 0.2
points at most, not clear of zero, and the last accuracy among all classes is 0.3 to 0.8 lower on
four sequences, clear of zero on two (five seeds, benchmarks/embedded/RESULTS.md at that commit).
Held on made images, without text anchors (orders III and IV; one seed, which does not tell half a
point apart) the mean of Transfer, Average and Last is 81.06 with it and 80.95 without. Learnable
prototypes, the update "batch" and L_proto were no better.
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
