"""A teacher: the features of a frozen model on one task, each computed at most once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mulki.clip.features import Features, of_reference


class FeatureCache:
    """Features of the n samples of a set, each computed when it is first asked for.

    Args:
        size: n; None if the features of a sample change, so that nothing may be kept.
    """

    def __init__(self, size: int | None):
        self._size = size
        # On the CPU, so that looking up a batch does not wait for a GPU.
        self._known = torch.zeros(size or 0, dtype=torch.bool)
        self._features: Tensor | None = None
        #: Whether the features of the whole set came at once.
        self.filled = False

    def fill(self, features: Tensor) -> None:
        """Keep the features [n, D] of the whole set, if they may be kept.

        Raises:
            ValueError: they have another number of rows.
        """
        if self._size is None:
            return
        if len(features) != self._size:
            raise ValueError(f"features: got {len(features)} rows, wanted {self._size}")
        self._features = features
        self._known.fill_(True)
        self.filled = True

    def get(self, index: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of a batch [B, D].

        Args:
            index: [B] places of the batch in the set, on the CPU.
            encode: from the places in the batch [M] of samples that are not known yet, on the CPU,
                to their features [M, D]; not called when there are none.
        """
        if self._size is None:
            return encode(torch.arange(len(index)))
        new = torch.nonzero(~self._known[index]).flatten()
        if len(new):
            features = encode(new)
            if self._features is None:
                self._features = features.new_empty(self._size, features.shape[1])
            self._features[index[new].to(features.device)] = features
            self._known[index] = True
        assert self._features is not None
        return self._features[index.to(self._features.device)]

    def state(self) -> dict[str, Tensor]:
        """What was computed batch by batch: in other batches, features are rounded otherwise."""
        if self._features is None or self.filled:
            return {}
        return {"known": self._known, "features": self._features[self._known]}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Set what `state` returned."""
        if not state:
            return
        self._known = state["known"]
        known = state["features"].to(device)
        self._features = known.new_empty(len(self._known), known.shape[1])
        self._features[self._known] = known


class Teacher:
    """A frozen model's view of one task.

    Texts and prototypes are constants of the task. If the training transform is deterministic, the
    features of an image are constant too, and each image is encoded once.

    Args:
        texts: [C, D] class text features.
        scale: logit scale, 0-d.
        prototypes: [C, D] class means of this model over the training set, or None.
        num_images: size n of the training set if image features are constant, else None.
        num_reference: size of the reference set if its features are to be kept, else None.
        num_anchors: number of texts beyond the task's classes.
    """

    def __init__(
        self,
        texts: Tensor,
        scale: Tensor,
        prototypes: Tensor | None,
        num_images: int | None,
        num_reference: int | None = None,
        num_anchors: int = 0,
    ):
        self.texts = texts
        self.scale = scale
        self.prototypes = prototypes
        self._images = FeatureCache(num_images)
        self._reference = FeatureCache(num_reference)
        self._num_anchors = num_anchors
        self._anchors = FeatureCache(num_anchors)
        self._anchored: Tensor | None = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The features that were computed batch by batch."""
        return {name: cache.state() for name, cache in self._caches().items()}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set what `state` returned."""
        for name, cache in self._caches().items():
            cache.restore(state[name], self.texts.device)

    def _caches(self) -> dict[str, FeatureCache]:
        return {"images": self._images, "reference": self._reference, "anchors": self._anchors}

    def remember(self, **features: Tensor) -> None:
        """Keep the features of a whole set, if these are constant.

        Args:
            **features: [n, D] each, of `images`, `reference` or `anchors`, as the functions that
                encode them return them; on the device of the texts or in the host's memory.

        Raises:
            ValueError: they have another number of rows.
        """
        for name, of_set in features.items():
            self._caches()[name].fill(of_set)

    def without_images(self) -> Features:
        """The features of its texts alone, with no row of images."""
        return Features(self.texts[:0], self.texts, self.scale)

    @torch.no_grad()
    def features(self, index: Tensor, encode: Callable[[Tensor], Tensor]) -> Features:
        """Features of a batch.

        Args:
            index: [B] places of the batch in the training set, on the CPU.
            encode: see `FeatureCache.get`.
        """
        images = self._images.get(index, encode).to(self.texts.device)
        return Features(images, self.texts, self.scale, self.prototypes)

    @torch.no_grad()
    def reference_features(
        self, index: Tensor, encode: Callable[[Tensor], Tensor], *, captions: bool = True
    ) -> Features:
        """Features of a batch of the reference set.

        Args:
            index: [R] places of the batch in the reference set, on the CPU.
            encode: see `FeatureCache.get`; returns [M, 2 D], image beside caption features.
            captions: without them `encode` returns [M, D], image features.
        """
        features = self._reference.get(index, encode).to(self.texts.device)
        if not captions:
            return of_reference(features, None, self.scale)
        images, texts = (half.contiguous() for half in features.chunk(2, dim=1))
        return of_reference(images, texts, self.scale)

    @torch.no_grad()
    def anchored(self, index: Tensor | None, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Text features [C + M, D] of the classes and of anchors, each text encoded once.

        Args:
            index: [M] places among the task's anchors, on the CPU; None for all of them.
            encode: see `FeatureCache.get`.
        """
        every = torch.arange(self._num_anchors)
        if index is not None:
            anchors = self._anchors.get(index, encode)
            return torch.cat([self.texts, anchors.to(self.texts.device)])
        if self._anchored is None:
            # The cache would keep a second copy.
            filled = self._anchors.filled
            anchors = self._anchors.get(every, encode) if filled else encode(every)
            self._anchored = torch.cat([self.texts, anchors.to(self.texts.device)])
        return self._anchored
