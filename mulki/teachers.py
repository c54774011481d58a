"""Teachers: what a frozen model says of one task, kept so that nothing is said twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mulki.features import Features


class Teacher:
    """A frozen model's view of one task.

    Texts and prototypes are constants of the task. Image features are constants too when the
    training transform is deterministic: each image is then encoded once and looked up afterwards.

    Args:
        texts: [C, D] class text features.
        scale: logit scale, 0-d.
        prototypes: [C, D] class means of this model over the training set, or None.
        num_images: size n of the training set if image features may be kept, else None.
    """

    def __init__(
        self, texts: Tensor, scale: Tensor, prototypes: Tensor | None, num_images: int | None
    ):
        self.texts = texts
        self.scale = scale
        self.prototypes = prototypes
        self._kept: Tensor | None = None
        if num_images is not None:
            self._kept = texts.new_empty(num_images, texts.shape[1])
            self._known = torch.zeros(num_images, dtype=torch.bool, device=texts.device)

    def remember(self, image_features: Tensor) -> None:
        """Keep the features [n, D] of the whole training set, if they may be kept.

        Raises:
            ValueError: they are not those of the whole set.
        """
        if self._kept is not None:
            if image_features.shape != self._kept.shape:
                raise ValueError(
                    f"image_features: got shape {list(image_features.shape)}, wanted "
                    f"{list(self._kept.shape)}"
                )
            self._kept.copy_(image_features)
            self._known.fill_(True)

    @torch.no_grad()
    def features(
        self, index: Tensor, images: Tensor, encode: Callable[[Tensor], Tensor]
    ) -> Features:
        """Features of a batch.

        Args:
            index: [B] places of the images in the training set.
            images: [B, 3, H, W].
            encode: from images to this model's features [B, D]; called for images not known yet.
        """
        return Features(
            self._images(index, images, encode), self.texts, self.scale, self.prototypes
        )

    def _images(self, index: Tensor, images: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        if self._kept is None:
            return encode(images)
        index = index.to(self._kept.device)
        new = ~self._known[index]
        if new.any():
            self._kept[index[new]] = encode(images[new.to(images.device)])
            self._known[index] = True
        return self._kept[index]
