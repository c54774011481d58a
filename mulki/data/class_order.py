"""The classes of a task in another order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mulki.data.subset import relabelled
from mulki.data.task import Task
from mulki.errors import InputError


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
        train=relabelled(task.train, index),
        test=relabelled(task.test, index),
        val=None if task.val is None else relabelled(task.val, index),
    )
