"""Blank images in place of those of a published data set that is not there, to plan with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mulki.data.published.entries import Protocol
from mulki.data.task import Task

# Pixels of an ordinary photograph in these data sets, which the model's transform resizes.
_SIZE = (500, 375)


@dataclass(frozen=True)
class BlankImages:
    """Grey images of one size; an `ImageSet`.

    Attributes:
        targets: class indices, [n].
    """

    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", _SIZE, "grey")

    def name(self, index: int) -> str:
        return f"blank image {index}"

    def fingerprint(self) -> str:
        return "blank"


def blank_task(
    name: str, classes: Sequence[str], templates: Sequence[str], protocol: Protocol
) -> Task:
    """A task with the published numbers of classes and images, all of them blank.

    Args:
        name: of the task.
        classes: names, where they are known; numbers stand in for others.
        templates: prompts.
        protocol: has the numbers, that of the training images too.
    """
    assert protocol.train is not None
    count = protocol.num_classes
    names = tuple(classes) if len(classes) == count else tuple(map(str, range(count)))
    train, test = (
        BlankImages(tuple(i % count for i in range(images)))
        for images in (protocol.train, protocol.test)
    )
    return Task(name, names, tuple(templates), train, test)
