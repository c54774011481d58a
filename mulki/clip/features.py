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
            the method needs one; images and captions correspond row by row. Captions that the
            method does not ask of this model have no rows, [0, D].
        anchored: [C + S + V, D] text features of the classes and of the text anchors that the
            method needs: S classes of earlier tasks, then V words of a vocabulary. None if it needs
            none or there are none. In one tensor, since losses take classes and anchors together
            and a copy of many anchors would cost as much as their logits.
        num_seen: S.
        replay: features of R images of earlier tasks [R, D], and as its texts those of the task's
            C classes and of S classes of earlier tasks [C + S, D]. None if the method replays none,
            and in the first task. Of the student alone.
        replay_target: [R] int64 in [0, C + S), the classes of these images.
        inputs: [B, D] image features of what the method has made of each image of the batch
            (`mulki.methods.Method.inputs`), None if it makes none.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> images, texts = normalize(torch.randn(8, 512)), normalize(torch.randn(5, 512))
        >>> Features(images, texts, scale=100.0).image_text()
        Similarity([8, 5], width=512, scale=100, float32, cpu)
    """

    images: Tensor
    texts: Tensor
    scale: Tensor | float
    prototypes: Tensor | None = None
    reference: Features | None = None
    anchored: Tensor | None = None
    num_seen: int = 0
    replay: Features | None = None
    replay_target: Tensor | None = None
    inputs: Tensor | None = None

    def image_text(self) -> Similarity:
        """The class logits [B, C]."""
        return Similarity(self.images, self.texts, self.scale)

    @property
    def seen(self) -> Tensor | None:
        """Text features [S, D] of the classes of earlier tasks, None if there are none."""
        return self._anchors(0, self.num_seen)

    @property
    def vocabulary(self) -> Tensor | None:
        """Text features [V, D] of the words of a vocabulary, None if there are none."""
        return self._anchors(self.num_seen, None)

    def _anchors(self, start: int, stop: int | None) -> Tensor | None:
        if self.anchored is None:
            return None
        group = self.anchored[len(self.texts) :][start:stop]
        return group if len(group) else None


def of_reference(images: Tensor, captions: Tensor | None, scale: Tensor | float) -> Features:
    """Features of R images [R, D] and of their captions [R, D], if there are any."""
    return Features(images, images[:0] if captions is None else captions, scale)
