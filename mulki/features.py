"""Features: what one model computes for one batch, and all that losses and methods get."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mulki.similarity import Similarity


@dataclass(frozen=True, eq=False)
class Features:
    """Outputs of one model (the student or a teacher) for a batch of B images and C classes.

    All rows are L2-normalised. Models may differ in width D.

    Args:
        images: [B, D] image features.
        texts: [C, D] class text features, one row per class of the task.
        scale: the model's logit scale, already exponentiated.
        prototypes: [C, D] visual prototypes (class means), or None where a method has none.
        reference: features of R images [R, D] and of their captions [R, D] from a reference set, if
            the method needs one; images and captions correspond row by row. Captions that the
            method does not ask of this model have no rows, [0, D].
        seen: [S, D] text features of the classes of earlier tasks, if the method needs these
            anchors and there are such classes.
        vocabulary: [V, D] text features of the words of a vocabulary, if the method needs these
            anchors.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor | float
    prototypes: Tensor | None = None
    reference: Features | None = None
    seen: Tensor | None = None
    vocabulary: Tensor | None = None

    def image_text(self) -> Similarity:
        """The class logits [B, C]."""
        return Similarity(self.images, self.texts, self.scale)


def of_reference(images: Tensor, captions: Tensor | None, scale: Tensor | float) -> Features:
    """Features of R images [R, D] and of their captions [R, D], if there are any."""
    return Features(images, images[:0] if captions is None else captions, scale)


def with_anchors(features: Features, texts: Tensor, seen: int) -> Features:
    """The features with those of anchors [M, D], of which the first `seen` are earlier classes."""
    groups = [group if len(group) else None for group in (texts[:seen], texts[seen:])]
    return replace(features, seen=groups[0], vocabulary=groups[1])
