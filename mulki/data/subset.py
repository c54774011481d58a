"""A smaller version of a task: for few-shot learning, smoke tests and quick looks."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Sequence
from itertools import chain, zip_longest

from PIL import Image

from mulki.data.caption_task import CaptionedImages, same_text
from mulki.data.task import ImageSet, Task
from mulki.errors import InputError


class Subset:
    """Some images of a set, in the order of `indices`.

    Args:
        image_set: the whole set.
        indices: places of the images in it.
        first_class: the class of the whole set that is class 0 here.
    """

    def __init__(self, image_set: ImageSet, indices: Sequence[int], first_class: int = 0):
        self.image_set = image_set
        self.indices = tuple(indices)
        self.first_class = first_class
        self.targets = [image_set.targets[i] - first_class for i in self.indices]
        #: Images of the set that this one is a sample of, where costs are measured: a cache that
        #: would not hold all of them does not hold these.
        self.sample_of = len(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        return self.image_set.load(self.indices[index])

    def name(self, index: int) -> str:
        return self.image_set.name(self.indices[index])

    def fingerprint(self) -> str:
        whole = f"{self.image_set.fingerprint()} {self.indices}"
        if self.first_class:
            whole += f" {self.first_class}"
        return hashlib.sha256(whole.encode()).hexdigest()


def limited(task: Task, count: int) -> Task:
    """The task with at most `count` images in each split, but at least one of every class.

    Classes are kept balanced: the first image of every class, then the second, and so on. A task of
    captions keeps at least two images, as many images as it can and then as many captions.
    """

    def limit(image_set: ImageSet) -> ImageSet:
        if isinstance(image_set, CaptionedImages):
            texts = [same_text(each[0]) for each in image_set.captions]
            order = in_turns(texts)
            by_image = in_turns([image_set.name(index) for index in order])
            kept = sorted(order[place] for place in by_image[: max(count, 2)])
            captions = tuple(image_set.captions[index] for index in kept)
            return CaptionedImages(Subset(image_set.images, kept), captions)
        picked = in_turns(image_set.targets)
        return Subset(image_set, sorted(picked[: max(count, len(set(image_set.targets)))]))

    val = None if task.val is None else limit(task.val)
    return dataclasses.replace(task, train=limit(task.train), test=limit(task.test), val=val)


def in_turns(kinds: Sequence[Hashable]) -> list[int]:
    """Places: the first of every kind, then the second, and so on."""
    by_kind: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        by_kind.setdefault(kind, []).append(index)
    turns = chain.from_iterable(zip_longest(*by_kind.values()))
    return [index for index in turns if index is not None]


def sampled(task: Task, count: int) -> Task:
    """`limited`, to measure what the whole task costs."""
    small = limited(task, count)
    for part, whole in ((small.train, task.train), (small.test, task.test)):
        part = part.images if isinstance(part, CaptionedImages) else part
        assert isinstance(part, Subset)
        part.sample_of = len(whole)
    return small


def few_shot(task: Task, shots: int, seed: int) -> Task:
    """The task with at most `shots` training images of each class; the test split stays whole.

    They are the first ones of each class in the order of `permutation` with that seed.
    """
    taken: dict[int, int] = {}
    picked = []
    for index in permutation(len(task.train), seed):
        target = task.train.targets[index]
        if taken.get(target, 0) < shots:
            taken[target] = taken.get(target, 0) + 1
            picked.append(index)
    return dataclasses.replace(task, train=Subset(task.train, sorted(picked)))


def held_back(task: Task, fraction: float) -> Task:
    """The task with a share of the training images of each class as its validation images.

    Which ones they are depends on their places in the set alone, and on no seed. A class keeps at
    least one image to train on; of one with more, at least one is held back.
    """
    by_class: dict[int, list[int]] = {}
    for place in permutation(len(task.train), 0):
        by_class.setdefault(task.train.targets[place], []).append(place)
    taken: set[int] = set()
    for places in by_class.values():
        count = min(max(round(fraction * len(places)), 1), len(places) - 1)
        taken.update(places[:count])
    if not taken:
        raise InputError(
            f"--val-fraction: task {task.name} has one training image of each class, of which none "
            "can be held back; leave it out"
        )
    kept = [place for place in range(len(task.train)) if place not in taken]
    return dataclasses.replace(
        task, train=Subset(task.train, kept), val=Subset(task.train, sorted(taken))
    )


def permutation(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order of chance, the same for the same seed."""
    import torch  # listing tasks does without it

    # A test holds the orders that published splits are drawn with.
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
