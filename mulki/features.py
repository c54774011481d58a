"""Features: what one model computes for one batch, and all that losses and methods get."""

from __future__ import annotations

from dataclasses import dataclass

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
            the method needs one; images and captions correspond row by row.
    """

    images: Tensor
    texts: Tensor
    scale: Tensor | float
    prototypes: Tensor | None = None
    reference: Features | None = None

    def image_text(self) -> Similarity:
        """The class logits [B, C]."""
        return Similarity(self.images, self.texts, self.scale)
