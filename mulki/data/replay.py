"""Images of earlier tasks that are shown again: which ones are kept, and their classes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from itertools import chain

from PIL import Image

from mulki.data.subset import in_turns, permutation
from mulki.data.task import ImageSet, Task

BALANCED = "balanced"
RESERVOIR = "reservoir"

# Differences of the seeds of two tasks.
_TASK_SEEDS = 7919


def kept_places(
    targets: Sequence[Sequence[int]], size: int, choice: str, seed: int
) -> list[tuple[int, int]]:
    """Which images a buffer holds after some tasks, as pairs of task and place in it, in order.

    It is a function of its arguments alone, so a run that goes on has the buffer that it had.

    Args:
        targets: class indices of the training images of each task.
        size: of the buffer, in images.
        choice: `BALANCED`, equally many of each class, as far as it has so many, or one each of
            classes drawn where they are more than the buffer's images; or `RESERVOIR`, the images
            of all tasks pass by once, and each of them is equally likely to be kept (Vitter 1985).
        seed: of the draws.
    """
    drawn = [
        (task, place)
        for task, of_task in enumerate(targets)
        for place in permutation(len(of_task), seed + _TASK_SEEDS * task)
    ]
    if choice == BALANCED:
        kinds = [(task, targets[task][place]) for task, place in drawn]
        turns, classes = in_turns(kinds), len(set(kinds))
        if size < classes:
            # The chance of a class stays, so that none comes back that was dropped.
            chances = {of: random.Random(f"{seed} {of}").random() for of in set(kinds)}
            turns = sorted(turns[:classes], key=lambda index: chances[kinds[index]])
        return sorted(drawn[index] for index in turns[:size])
    chance = random.Random(seed)
    kept = drawn[:size]
    for count, image in enumerate(drawn[size:], start=size + 1):
        if (place := chance.randrange(count)) < size:
            kept[place] = image
    return sorted(kept)


class ReplayImages:
    """Kept images of earlier tasks, whose classes are numbered after those of the current task.

    A class of an earlier task whose first prompt another class has is that class.

    Args:
        tasks: of the sequence, up to the current one.
        places: from `kept_places`, at least one.
        batch_size: how many come with each batch, in each process; None for as many as are in it.

    Attributes:
        texts: first prompts of the classes of earlier tasks that are none of the current task, [S];
            class C + s is that of text s, where the current task has C classes.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        places: Sequence[tuple[int, int]],
        batch_size: int | None = None,
    ):
        self.batch_size = batch_size
        *earlier, current = tasks
        self._tasks = earlier
        self._places = tuple(places)
        numbers = {prompts[0]: number for number, prompts in enumerate(current.prompts())}
        prompts = [[of_class[0] for of_class in task.prompts()] for task in earlier]
        known = len(current.classes)
        self.texts: list[str] = []
        for text in chain.from_iterable(prompts):
            if text not in numbers:
                numbers[text] = known + len(self.texts)
                self.texts.append(text)
        self.targets = [
            numbers[prompts[task][earlier[task].train.targets[place]]]
            for task, place in self._places
        ]

    def __len__(self) -> int:
        return len(self._places)

    def load(self, index: int) -> Image.Image:
        images, place = self._at(index)
        return images.load(place)

    def name(self, index: int) -> str:
        images, place = self._at(index)
        return images.name(place)

    def fingerprint(self) -> str:
        parts = [task.train.fingerprint() for task in self._tasks]
        return hashlib.sha256(f"{parts} {self._places} {self.targets}".encode()).hexdigest()

    def _at(self, index: int) -> tuple[ImageSet, int]:
        task, place = self._places[index]
        return self._tasks[task].train, place
