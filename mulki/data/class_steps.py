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
    One may be without validation images.

    Args:
        task: the whole.
        counts: classes of each step, at least two.

    Raises:
        InputError: counts that are not those of all classes, or a step without images.
    """
    if sum(counts) != len(task.classes) or min(counts) < 2:
        raise InputError(
            f'task "{task.name}": got steps of {", ".join(map(str, counts))} classes, wanted '
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
                texts=task.texts[start:end],
                train=part(task.train),
                test=part(task.test),
                val=None if task.val is None else part(task.val) or None,
            )
        )
    return steps


def equal_steps(task: Task, increments: int, base_classes: int = 0) -> list[Task]:
    """Cut a task into a first step of `base_classes`, if any, and equal ones of the other classes.

    Args:
        task: the whole.
        increments: the number of equal steps.
        base_classes: classes of the step before them; 0 for no such step.

    Raises:
        InputError: the other classes are not a multiple of `increments`, or a step has fewer than
            two classes.
    """
    rest = len(task.classes) - base_classes
    if rest <= 0:
        raise InputError(
            f"--base-classes: got {base_classes}, wanted fewer than the {len(task.classes)} "
            f"classes of {task.name}"
        )
    if rest % increments or rest // increments < 2:
        possible = [n for n in range(1, rest // 2 + 1) if rest % n == 0]
        raise InputError(
            f"--increments: got {increments}, but {rest} classes of {task.name} make no equal "
            f"steps of that number with two classes or more; "
            f"{', '.join(map(str, possible)) or 'no number'} would do"
        )
    base = [base_classes] if base_classes else []
    counts = [*base, *[rest // increments] * increments]
    return class_steps(task, counts) if len(counts) > 1 else [task]


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
