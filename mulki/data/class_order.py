"""The classes of a task in another order."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from PIL import Image

from mulki.data.task import ImageSet, Task
from mulki.errors import InputError


class Relabelled:
    """The images of a set with other class indices.

    Args:
        image_set: the whole set.
        index: the new index of each class, [C].
    """

    def __init__(self, image_set: ImageSet, index: Sequence[int]):
        self.image_set = image_set
        self.index = tuple(index)
        self.targets = [self.index[target] for target in image_set.targets]

    def __len__(self) -> int:
        return len(self.image_set)

    def load(self, index: int) -> Image.Image:
        return self.image_set.load(index)

    def name(self, index: int) -> str:
        return self.image_set.name(index)

    def fingerprint(self) -> str:
        whole = f"{self.image_set.fingerprint()} {self.index}"
        return hashlib.sha256(whole.encode()).hexdigest()


def reordered(task: Task, order: Sequence[int]) -> Task:
    """The task with its classes in another order.

    Args:
        order: the old index of each class, [C].

    Raises:
        InputError: no permutation of the task's classes.
    """
    if sorted(order) != list(range(len(task.classes))):
        raise InputError(
            f'task "{task.name}": got an order of {len(order)} classes, wanted one of its '
            f"{len(task.classes)} in which each occurs once"
        )
    index = [0] * len(order)
    for new, old in enumerate(order):
        index[old] = new
    return dataclasses.replace(
        task,
        classes=tuple(task.classes[old] for old in order),
        texts=tuple(task.texts[old] for old in order) if task.texts else (),
        train=Relabelled(task.train, index),
        test=Relabelled(task.test, index),
        val=None if task.val is None else Relabelled(task.val, index),
    )
