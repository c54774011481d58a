"""The tasks of a run: loaded, cut into steps of classes, reduced."""

from __future__ import annotations

from mulki.data import Source, Task, load_sequence
from mulki.data.class_steps import equal_steps
from mulki.data.published import entry_names
from mulki.data.subset import few_shot, limited
from mulki.engine.config import RunConfig
from mulki.engine.rates import learning_rates
from mulki.errors import InputError, nearest


def load_tasks(config: RunConfig) -> list[Task]:
    """The tasks of a configuration, in their order.

    Raises:
        InputError: see `mulki.data.load_sequence` and `mulki.data.class_steps.equal_steps`, or
            several tasks in a class-incremental run.
    """
    tasks = load_sequence(
        config.tasks,
        config.order,
        skip_bad_images=config.skip_bad_images,
        source=Source(config.data_root, config.protocol),
    )
    if config.scenario == "cil":
        if len(tasks) != 1:
            raise InputError(
                f"--scenario cil: got {len(tasks)} tasks, wanted the one whose classes are learned "
                "in steps; name one, such as cil:cifar100"
            )
        tasks = equal_steps(tasks[0], config.increments or 1, config.base_classes)
    if config.shots is not None:
        tasks = [few_shot(task, config.shots, config.seed) for task in tasks]
    if config.limit_images is not None:
        tasks = [limited(task, config.limit_images) for task in tasks]
    names = {*(task.name for task in tasks), *entry_names()}
    for name in learning_rates(config.lr_of):
        if name not in names:
            raise InputError(
                f"--lr-of: got a rate of {name}, but no task is called so{nearest(name, names)}"
            )
    return tasks
