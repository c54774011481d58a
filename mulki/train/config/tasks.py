"""The tasks of a run: loaded, cut into steps of classes, reduced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from mulki import methods
from mulki.choices.options import flag
from mulki.data import CaptionTask, Source, Task, load_sequence
from mulki.data.class_steps import equal_steps
from mulki.data.decoding import limit_pixels
from mulki.data.prompts import fill
from mulki.data.published import Entry, entry_names
from mulki.data.subset import few_shot, limited
from mulki.errors import InputError, nearest
from mulki.files import limit_members
from mulki.methods import ZERO_SHOT, Method, Needs
from mulki.train.config import presets
from mulki.train.config.rates import learning_rates
from mulki.train.config.run_config import RunConfig, Settings, csv_form

_log = logging.getLogger(__name__)


def load_tasks(
    config: RunConfig,
    absent: Callable[[Entry], None] | None = None,
    *,
    test_only: bool = False,
    inherited: bool = False,
) -> list[Task]:
    """The tasks of a configuration, in their order, as `reduced`.

    Args:
        config: options of the run.
        absent: see `mulki.data.Source`.
        test_only, inherited: see `mulki.data.load_sequence`.

    Raises:
        InputError: see `mulki.data.load_sequence` and `reduced`.
    """
    tasks = load_sequence(
        config.tasks,
        config.order,
        skip_bad_images=config.skip_bad_images,
        test_fraction=config.test_fraction,
        test_only=test_only,
        inherited=inherited or config.continue_ is not None,
        form=csv_form(config),
        source=Source(config.data_root, config.protocol, absent),
    )
    return reduced(config, tasks)


def limit_reading(config: RunConfig) -> None:
    """Refuse images and files that are too large, in this process from now on."""
    limit_pixels(config.max_pixels)
    limit_members(config.max_member_mb)


def reduced(config: RunConfig, tasks: Sequence[Task]) -> list[Task]:
    """Tasks cut into steps of classes, and with fewer images, as the options say.

    Raises:
        InputError: see `mulki.data.class_steps.equal_steps`; several tasks in a class-incremental
            run; options of classes beside a task of captions; or the learning rate of no task.
    """
    captions = [task.name for task in tasks if isinstance(task, CaptionTask)]
    # A run that goes on has its shots from the earlier one.
    shots = config.shots is not None and config.continue_ is None
    of_classes = {"--scenario cil": config.scenario == "cil", "--shots": shots}
    for option, given in of_classes.items():
        if given and captions:
            raise InputError(
                f"{option}: task {captions[0]} has captions and no classes; leave one of them out"
            )
    if config.scenario == "cil":
        if len(tasks) != 1:
            raise InputError(
                f"--scenario cil: got {len(tasks)} tasks, wanted the one whose classes are learned "
                "in steps; name one, such as cil:cifar100"
            )
        tasks = equal_steps(tasks[0], config.increments or 1, config.base_classes)
    if config.shots is not None:
        tasks = [
            few_shot(task, config.shots, config.seed) if task.classes else task for task in tasks
        ]
    if config.limit_images is not None:
        for task in tasks:
            if len(task.classes) > config.limit_images:
                _log.warning(
                    "--limit-images %d: task %s keeps an image of each of its %d classes",
                    config.limit_images,
                    task.name,
                    len(task.classes),
                )
        tasks = [limited(task, config.limit_images) for task in tasks]
    names = {*(task.name for task in tasks), *entry_names()}
    for name in learning_rates(config.lr_of):
        if name not in names:
            raise InputError(
                f"--lr-of: got a rate of {name}, but no task is called so{nearest(name, names)}"
            )
    return list(tasks)


def needs_of(method: Method, task: Task) -> Needs:
    """What a method needs while it learns a task."""
    return method.needs.without_classes() if isinstance(task, CaptionTask) else method.needs


def teachers_of(method: Method, tasks: Sequence[Task]) -> set[str]:
    """The models that a method needs beside the student in any of the tasks."""
    every = [needs_of(method, task) for task in tasks]
    prototypes = {ZERO_SHOT} if any(needs.prototypes for needs in every) else set()
    return prototypes.union(*(needs.teachers for needs in every))


def check_captions(
    tasks: Sequence[Task], method: type[Method], batch_size: int, processes: int
) -> None:
    """Check that tasks of captions, if there are any, can be learned.

    Args:
        batch_size: of each process.

    Raises:
        InputError: the method learns none, or a batch has one pair or more pairs than a task.
    """
    for task in tasks:
        if not isinstance(task, CaptionTask):
            continue
        if not method.takes_captions():
            able = [name for name, each in methods.available().items() if each.takes_captions()]
            raise InputError(
                f"--method: task {task.name} has captions and no classes, from which {method.name} "
                f"does not learn; choose from {', '.join(able)}"
            )
        batch, pairs = batch_size * processes, len(task.train)
        if method.trains and not 2 <= batch <= pairs:
            raise InputError(
                f"--batch-size: got {batch} pairs a step to tell apart, but task {task.name} has "
                f"{pairs}; wanted 2 to {pairs}"
            )


def check_options_of_classes(settings: Settings, tasks: Sequence[Task]) -> None:
    """Check that no option is about classes where no task has any.

    A value that is the default or the preset's counts as not chosen by the user, since
    configuration files name all options; so do all values of a run that goes on, which come from
    the earlier one.

    Raises:
        InputError: naming the options that have no effect.
    """
    if any(task.classes for task in tasks) or settings.run.continue_ is not None:
        return
    run = settings.run
    usual = presets.lookup(run.model, run.method, run.preset)
    idle = [
        _as_given(item.name, value)
        for options in (run, settings.method)
        for item in fields(options)
        if item.metadata["of_classes"]
        and (value := getattr(options, item.name)) != usual.get(item.name, item.default)
    ]
    if idle:
        raise InputError(
            f"{', '.join(idle)}: about classes, but the tasks have captions alone, so this changes "
            "nothing; leave it out"
        )


def _as_given(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {' '.join(value) if isinstance(value, tuple) else value}"


def warn_of_equal_names(tasks: Sequence[Task], tokens: Callable[[list[str]], Tensor]) -> None:
    """Warn of classes of a task whose names differ in capitals alone, which the model cannot see.

    Args:
        tasks: of a run.
        tokens: [n, length] of n texts.
    """
    for task in tasks:
        by_folded: dict[str, list[str]] = {}
        for name in task.classes:
            by_folded.setdefault(name.casefold(), []).append(name)
        for one, *others in by_folded.values():
            for other in others:
                first, second = tokens([fill(task.templates[0], name) for name in (one, other)])
                if first.equal(second):
                    _log.warning(
                        'task %s: the classes "%s" and "%s" are the same to the tokenizer, so '
                        "nothing can tell them apart; rename one or merge the two",
                        task.name,
                        one,
                        other,
                    )
