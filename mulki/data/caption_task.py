"""A task without classes: images with captions, to be told apart from those of other images."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image

from mulki.data.task import ImageSet, Task
from mulki.errors import InputError


def same_text(caption: str) -> str:
    """What two captions share that are one text: they differ in capitals and white space alone.

    So CLIP's tokenizer sees them. A tokenizer that sees more is given the one that comes first, and
    one that sees less, or cuts long captions off, makes no more captions equal: what a model cannot
    tell apart, it is tested on all the same.
    """
    return " ".join(unicodedata.normalize("NFC", caption).casefold().split())


@dataclass(frozen=True)
class CaptionedImages:
    """Images, each with one or several captions; an `ImageSet` whose targets mean nothing.

    Args:
        images: n images.
        captions: of each image, at least one, [n].
    """

    images: ImageSet
    captions: tuple[tuple[str, ...], ...]

    @cached_property
    def targets(self) -> Sequence[int]:
        return (0,) * len(self)

    @property
    def sample_of(self) -> int:
        """See `mulki.data.subset.Subset.sample_of`."""
        return int(getattr(self.images, "sample_of", len(self)))

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return self.images.load(index)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def fingerprint(self) -> str:
        """Hex SHA-256 of images and captions, the same wherever the files lie."""
        content = json.dumps([self.images.fingerprint(), self.captions])
        return hashlib.sha256(content.encode()).hexdigest()

    def captions_of(self, name: str) -> frozenset[str]:
        """All captions of the image of that name, which may come several times, as `same_text`."""
        return self._by_image[name]

    @cached_property
    def _by_image(self) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for index, each in enumerate(self.captions):
            found.setdefault(self.name(index), set()).update(map(same_text, each))
        return {name: frozenset(each) for name, each in found.items()}

    def texts(self) -> tuple[str, ...]:
        """The distinct captions (see `same_text`), as written and in the order they first come."""
        found: dict[str, str] = {}
        for text in (text for each in self.captions for text in each):
            found.setdefault(same_text(text), text)
        return tuple(found.values())


@dataclass(frozen=True)
class CaptionTask(Task):
    """A task whose examples are pairs of an image and a caption.

    It has no classes and no templates. A model learns to tell each image's caption from those of
    other images, and is tested by retrieval: of captions by images, and of images by captions.

    Attributes:
        train: pairs, so each image has one caption here; one with several comes once for each.
        test: images, each with all of its captions.

    Raises:
        InputError: a split is empty or has one caption for all images, or a caption is empty.
    """

    classes: tuple[str, ...] = field(default=(), init=False)
    templates: tuple[str, ...] = field(default=(), init=False)
    train: CaptionedImages
    test: CaptionedImages

    def __post_init__(self) -> None:
        where = f'task "{self.name}"'
        if not self.name:
            raise InputError("a task has an empty name; give it one")
        for split, pairs in (("train", self.train), ("test", self.test)):
            if len(pairs) == 0 and split == "train" and self.test_only:
                continue
            if len(pairs) == 0:
                raise InputError(f"{where}: its {split} split is empty; add images with captions")
            if len(pairs.captions) != len(pairs) or not all(pairs.captions):
                raise InputError(
                    f"{where}: its {split} split has {len(pairs)} images and "
                    f"{sum(map(bool, pairs.captions))} of them have captions; give each image one"
                )
            texts = pairs.texts()
            if not all(text.strip() for text in texts):
                raise InputError(
                    f"{where}: a caption in its {split} split is empty; fill it in or remove it"
                )
            if len({pairs.name(index) for index in range(len(pairs))}) < 2:
                raise InputError(
                    f"{where}: its {split} split has one image; add others, or there is nothing to "
                    "tell apart"
                )
            if len(texts) < 2:
                raise InputError(
                    f'{where}: all images of its {split} split have the caption "{texts[0]}"; add '
                    "images with others, or there is nothing to tell apart"
                )
        if any(len(each) > 1 for each in self.train.captions):
            raise InputError(
                f"{where}: an image of its train split has several captions; list it once for each"
            )
