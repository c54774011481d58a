"""Class-incremental sequences: the classes of one task, learned in steps.

``embedded-flags`` has the 232 flags of the bundled pack in 8 steps of 29, ``embedded-glyphs`` its
digits in 2 steps of 5 and its letters in steps of 7, 7, 6 and 6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate, pairwise

from mulki.data.embedded import embedded_root
from mulki.data.sequences import register_sequence
from mulki.data.shards import open_pack
from mulki.data.subset import Subset
from mulki.data.task import ImageSet, Task
from mulki.errors import InputError


def class_steps(task: Task, counts: Sequence[int]) -> list[Task]:
    """Cut a task into tasks called ``name-1``, ``name-2``, ..., by its classes in their order.

    Each has the images of its own classes, with targets from 0, and the task's prompt templates.

    Args:
        task: the whole.
        counts: classes of each step, at least two.

    Raises:
        InputError: counts that are not those of all classes, or a step without images.
    """
    if sum(counts) != len(task.classes) or min(counts) < 2:
        raise InputError(
            f'task "{task.name}": steps of {", ".join(map(str, counts))} classes came, wanted '
            f"steps of at least two that sum to its {len(task.classes)} classes; change the counts"
        )
    steps = []
    for number, (start, end) in enumerate(pairwise(accumulate(counts, initial=0)), start=1):

        def part(whole: ImageSet, start: int = start, end: int = end) -> Subset:
            indices = [i for i, target in enumerate(whole.targets) if start <= target < end]
            return Subset(whole, indices, first_class=start)

        steps.append(
            dataclasses.replace(
                task,
                name=f"{task.name}-{number}",
                classes=task.classes[start:end],
                train=part(task.train),
                test=part(task.test),
            )
        )
    return steps


def _of_the_pack(sequence: str, order: str, counts: dict[str, tuple[int, ...]]) -> list[Task]:
    if order != "I":
        raise InputError(f'order "{order}": {sequence} has the order I')
    pack = open_pack(embedded_root())
    return [step for name, each in counts.items() for step in class_steps(pack.task(name), each)]


@register_sequence("embedded-flags")
def _flags(order: str) -> list[Task]:
    return _of_the_pack("embedded-flags", order, {"flags": (29,) * 8})


@register_sequence("embedded-glyphs")
def _glyphs(order: str) -> list[Task]:
    counts = {"digits": (5, 5), "letters": (7, 7, 6, 6)}
    return _of_the_pack("embedded-glyphs", order, counts)
