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
            # On the CPU, so that looking a batch up does not wait for a GPU.
            self._known = torch.zeros(num_images, dtype=torch.bool)

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

    @property
    def complete(self) -> bool:
        """Whether it knows the whole training set."""
        return self._kept is not None and bool(self._known.all())

    @torch.no_grad()
    def features(self, index: Tensor, encode: Callable[[Tensor], Tensor]) -> Features:
        """Features of a batch.

        Args:
            index: [B] places of the images in the training set, on the CPU.
            encode: from the places in the batch [M] of images that are not known yet, on the CPU,
                to this model's features of them [M, D]; not called when there are none.
        """
        return Features(self._images(index, encode), self.texts, self.scale, self.prototypes)

    def _images(self, index: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        if self._kept is None:
            return encode(torch.arange(len(index)))
        new = torch.nonzero(~self._known[index]).flatten()
        if len(new):
            self._kept[index[new].to(self._kept.device)] = encode(new)
            self._known[index] = True
        return self._kept[index.to(self._kept.device)]
