"""What the original model is asked for in a task, from a cache of teachers on disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mulki.clip.models import VisionLanguageModel
from mulki.clip.texts import text_features, text_inputs
from mulki.data.caption_task import CaptionTask
from mulki.data.reference import ReferenceSet
from mulki.data.task import ImageSet, Task
from mulki.methods import ZERO_SHOT
from mulki.train.config.tasks import needs_of
from mulki.train.learning.batches import kept_samples
from mulki.train.learning.inputs import Training
from mulki.train.learning.teacher_cache import TeacherCache
from mulki.train.learning.training_set import training_features

# Images, evenly spread over a set, whose pixels are part of its identity.
_LOOKED_AT = 64


@dataclass(frozen=True)
class StoredSets:
    """The sets of a task whose features lie on disk.

    Args:
        images: of the task; None if their features are not constant, or nobody asks for them.
        pairs: images and captions, those of the reference set or of a task of captions; likewise,
            and without captions where the method has none encoded.
    """

    images: ImageSet | None = None
    pairs: tuple[ImageSet, Sequence[str] | None] | None = None

    def __len__(self) -> int:
        return (0 if self.images is None else len(self.images)) + (
            0 if self.pairs is None else len(self.pairs[0])
        )


def stored_sets(
    training: Training, task: Task, reference: ReferenceSet | None, steps: int
) -> StoredSets:
    """The sets of a task whose features lie on disk; none without a cache.

    Args:
        reference: of the task, if the method needs one.
        steps: of the task.
    """
    needs = needs_of(training.method, task)
    if training.teacher_cache is None or ZERO_SHOT not in needs.teachers:
        return StoredSets()
    if training.transform is not training.model.preprocess:
        return StoredSets()
    images, pairs = kept_samples(training, task, reference, steps)
    wanted: tuple[ImageSet, Sequence[str] | None] | None = None
    if pairs is not None and isinstance(task, CaptionTask):
        wanted = task.train, [of_image[0] for of_image in task.train.captions]
    elif pairs is not None and reference is not None:
        wanted = reference.images, reference.captions if needs.captions else None
    return StoredSets(task.train if images is not None and needs.teacher_images else None, wanted)


class StoredFeatures:
    """Features of the original model for a task, from a cache.

    Args:
        cache: where they lie.
        model: the original one.
        training: how it encodes.
    """

    def __init__(self, cache: TeacherCache, model: VisionLanguageModel, training: Training):
        self.cache, self.model, self.training = cache, model, training

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[n, D] of n prompts, on the CPU."""
        return self.cache.features(self._of_texts(prompts), lambda: self._encode(prompts))

    def images(
        self, images: ImageSet, captions: Sequence[str] | None, encoded: Callable[[int], None]
    ) -> Tensor:
        """[n, D] of n images, on the CPU; [n, 2 D] with captions, each image beside its own.

        Args:
            encoded: called with numbers of images that are done.
        """
        left = len(images)

        def tell(done: int) -> None:
            nonlocal left
            left -= done
            encoded(done)

        def encode() -> Tensor:
            parts = training_features([self.model], images, self.training, tell)
            features = torch.cat([of_model for (of_model,) in parts])
            if captions is None:
                return features
            rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
            texts = self._encode(list(rows))
            return torch.cat([features, texts[[rows[caption] for caption in captions]]], dim=1)

        of: dict[str, object] = {
            "images": images.fingerprint(),
            "pixels": _pixels(images),
            # A function of open_clip is shown with its address.
            "transform": re.sub(" at 0x[0-9a-f]+", "", str(self.model.preprocess)),
        }
        if captions is not None:
            of |= self._of_texts(captions)
        found = self.cache.features(of, encode)
        if left:
            encoded(left)
        return found

    def _of_texts(self, prompts: Sequence[str]) -> dict[str, object]:
        # What is frozen of the text tower is computed without autocast.
        split = str(self.model.split)
        distinct = list(dict.fromkeys(prompts))
        tokens = self.model.tokenizer(distinct).tolist()
        return {"texts": list(prompts), "tokens": tokens, "part of the text tower": split}

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        world = self.training.world
        inputs = text_inputs(self.model, prompts, world)
        with self.training.precision.autocast():
            return text_features(self.model, inputs, world)


def _pixels(images: ImageSet) -> str:
    # A fingerprint of files knows their names and sizes; two sets may have the same.
    digest, count = hashlib.sha256(), min(len(images), _LOOKED_AT)
    for place in range(count):
        image = images.load(place * len(images) // count)
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()
