"""What a task is: class names, prompt templates, and labelled images to train and test on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from mulki.data.prompts import check_templates, filled
from mulki.errors import InputError


class ImageSet(Protocol):
    """A labelled list of images with random access. It must pickle, for DataLoader workers."""

    @property
    def targets(self) -> Sequence[int]:
        """Class index of each image, [n]."""

    def __len__(self) -> int:
        """Number of images, n."""

    def load(self, index: int) -> Image.Image:
        """The image as RGB, transparency composited on white.

        Raises:
            BadImage: it cannot be decoded; the message names it.
        """

    def name(self, index: int) -> str:
        """Path or shard member, for messages."""

    def fingerprint(self) -> str:
        """Hex SHA-256 that identifies the split: the same wherever the data lie."""


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        name: names the task in tables and files.
        classes: class names, [C], at least two to learn, no two alike.
        templates: prompts, each with exactly one `{}` for the class name.
        train: the images to learn from, with targets in 0..C-1.
        test: the images to test on, likewise.
        skipped: unreadable images that were left out, by path.
        test_fraction: the share of the images that was held out to test on, see
            `mulki.data.held_out`; None where the data have a split of their own.
        test_only: it is tested and not learned, so it may have no training images and one class.
        val: images by which the best step of training is chosen, with targets likewise; None
            without any. They are in neither of the other splits.
        texts: more prompts of each class beside those of the templates, [C]; empty for none.

    Raises:
        InputError: any of the above does not hold.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    skipped: tuple[str, ...] = ()
    test_fraction: float | None = None
    test_only: bool = False
    val: ImageSet | None = None
    texts: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        where = f'task "{self.name}"'
        if not self.name:
            raise InputError("a task has an empty name; give it one")
        for name in self.classes:
            # As that of a folder may be in another encoding. Tokenizers take no such text.
            if any("\ud800" <= letter <= "\udfff" for letter in name):
                raise InputError(f"{where}: class {name!a} is not UTF-8 text; rename it")
        if len(self.classes) < (1 if self.test_only else 2):
            raise InputError(f"{where}: {len(self.classes)} class(es); at least two are needed")
        if any(not c.strip() for c in self.classes):
            raise InputError(f"{where}: a class name is empty; give every class a name")
        twice = sorted(name for name, count in Counter(self.classes).items() if count > 1)
        if twice:
            raise InputError(f'{where}: class "{twice[0]}" occurs twice; rename or merge the two')
        object.__setattr__(self, "templates", check_templates(self.templates, where))
        if self.texts and len(self.texts) != len(self.classes):
            raise InputError(
                f"{where}: got {len(self.texts)} lists of texts for {len(self.classes)} classes; "
                "give each class one"
            )
        splits = [("train", self.train), ("test", self.test)]
        for split, images in splits if self.val is None else [*splits, ("validation", self.val)]:
            if len(images) == 0 and split == "train" and self.test_only:
                continue
            if len(images) == 0:
                raise InputError(f"{where}: its {split} split is empty; add images to it")
            if len(images.targets) != len(images):
                raise InputError(
                    f"{where}: its {split} split has {len(images)} images and "
                    f"{len(images.targets)} targets; give one target an image"
                )
            low, high = min(images.targets), max(images.targets)
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"{where}: target {low if low < 0 else high} in its {split} split lies "
                    f"outside 0..{len(self.classes) - 1}; correct the labels or add the class"
                )

    def prompts(self) -> list[list[str]]:
        """Every template filled with every class name, [C][T], and the class's own texts."""
        return filled(self.classes, self.templates, self.texts)

    def fingerprint(self) -> str:
        """Hex SHA-256 over class names, templates and all splits; the task's name is left out."""
        parts = [self.train.fingerprint(), self.test.fingerprint()]
        if self.val is not None:
            parts.append(self.val.fingerprint())
        return _digest([*self._said(), "", *parts])

    def prompts_fingerprint(self) -> str:
        """Hex SHA-256 over class names and templates."""
        return _digest(self._said())

    def _said(self) -> list[str]:
        texts = [line for of_class in self.texts for line in ("", *of_class)]
        return [*self.classes, "", *self.templates, *texts]

    def splits_fingerprint(self) -> str:
        """Hex SHA-256 over the splits that are learned and tested."""
        return _digest([self.train.fingerprint(), self.test.fingerprint()])


def split_fingerprint(images: Iterable[tuple[str, int, int]]) -> str:
    """Hex SHA-256 of a split, from each image's relative name, size in bytes, and target."""
    return _digest(f"{name}\0{size}\0{target}" for name, size, target in images)


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        # File names need not be valid UTF-8, and may hold line breaks.
        content = line.encode("utf-8", "surrogatepass")
        digest.update(b"%d:%b" % (len(content), content))
    return digest.hexdigest()
