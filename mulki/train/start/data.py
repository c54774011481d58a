"""The data of a run: its tasks, and beyond them its reference set and its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mulki.choices.options import flag
from mulki.data import CaptionTask, Task
from mulki.data.image_files import class_without_images
from mulki.data.reference import ReferenceSet, read_reference
from mulki.data.vocabulary import Vocabulary, imagenet_vocabulary, read_vocabulary
from mulki.errors import InputError
from mulki.methods import VOCABULARY, Method, Needs
from mulki.train.config.run_config import CURRENT, MADE, RunConfig, Settings
from mulki.train.config.tasks import check_captions, check_options_of_classes, load_tasks, reduced
from mulki.train.saving.description import LearnedTask
from mulki.train.start.continuation import earlier_tasks
from mulki.train.start.downloads import StandIns


class Data(NamedTuple):
    """What a run learns from.

    Args:
        tasks: in the order in which they are learned.
        reference: images and captions for the method; None without need, or where they come from
            each task's own images.
        vocabulary: words for the method, as text anchors or as captions of images without any; None
            without need.
        earlier: how many of the tasks an earlier run has learned, the first ones.
    """

    tasks: Sequence[Task]
    reference: ReferenceSet | None = None
    vocabulary: Vocabulary | None = None
    earlier: int = 0


def load_data(
    settings: Settings,
    method: Method,
    processes: int,
    tasks: Sequence[Task] | None = None,
    stand_ins: StandIns | None = None,
    learned: Sequence[LearnedTask] = (),
) -> Data:
    """Load the data of a run, and check it.

    Args:
        processes: of the run.
        tasks, stand_ins: as of `mulki.train.start.setup.prepared`.
        learned: by the run that this one goes on from.

    Raises:
        InputError: they cannot be read, or do not fit the options.
    """
    config, reference, vocabulary = settings.run, None, None
    if tasks is None:
        tasks = load_tasks(config, None if stand_ins is None else stand_ins.data_set)
    else:
        tasks = reduced(config, tasks)
    if method.needs.reference and config.reference not in (None, CURRENT, MADE):
        reference = read_reference(
            config.reference,
            captions=method.needs.captions,
            skip_bad_images=config.skip_bad_images,
        )
    if any(task.test_only for task in tasks):
        raise InputError("tasks: got one that is only to be tested; pass its training images too")
    for task in tasks if config.head or method.needs.prototypes else ():
        if (lacking := class_without_images(task.train, task.classes)) is not None:
            raise InputError(
                f"tasks: {task.name} has no training image of class {lacking}, whose mean is kept; "
                "add some, or take the class out of the task"
            )
    earlier = earlier_tasks(config, learned, replayed=method.needs.replay is not None)
    if twice := {task.name for task in tasks} & {task.name for task in earlier}:
        raise InputError(
            f"--continue: a task {min(twice)} was learned before; give the new one another name"
        )
    check_captions(tasks, type(method), config.batch_size, processes)
    check_options_of_classes(settings, tasks)
    tasks = [*earlier, *tasks]
    if VOCABULARY in needs_beyond_tasks(config, method, tasks).anchors:
        words = config.vocabulary
        vocabulary = imagenet_vocabulary() if words is None else read_vocabulary(words)
    return Data(tasks, reference, vocabulary, len(earlier))


def needs_beyond_tasks(config: RunConfig, method: Method, tasks: Sequence[Task] = ()) -> Needs:
    """What a method needs beside the tasks.

    The task's own images, and those made of them, are no reference set, but their captions are
    words of the vocabulary. Some needs are those of tasks with classes alone.
    """
    needs = method.needs
    if tasks and all(isinstance(task, CaptionTask) for task in tasks):
        needs = needs.without_classes()
    if not (needs.reference and config.reference in (CURRENT, MADE)):
        return needs
    words = {VOCABULARY} if needs.captions else set()
    return replace(needs, reference=False, anchors=tuple({*needs.anchors, *words}))


def check_reference(config: RunConfig, method: Method) -> None:
    """Raise an InputError where a method lacks its reference set."""
    if method.needs.reference and config.reference is None:
        needed, folder = "images with captions", "a folder with captions.csv"
        if not method.needs.captions:
            needed, folder = "reference images", "a folder of images"
        raise InputError(
            f"--reference: method {method.name} distils on {needed} and got none; pass {folder}, a "
            f"CSV with the columns path and caption, {MADE} or {CURRENT}"
        )


def check_unused(config: RunConfig, method: Method) -> None:
    """Raise an InputError where options name data that a method has no use for."""
    for name, (what, change) in unused(config, method).items():
        value = getattr(config, name)
        shown = " ".join(value) if isinstance(value, tuple) else value
        raise InputError(
            f"{flag(name)}: got {shown}, but method {method.name} with these options uses no "
            f"{what}; leave it out, or change {change}"
        )


def unused(config: RunConfig, method: Method) -> dict[str, tuple[str, str]]:
    """The options of data that a method has no use for, each with what it is and what to change."""
    needs = method.needs
    words = VOCABULARY in needs_beyond_tasks(config, method).anchors
    made = needs.reference and config.reference == MADE
    known = (
        ("reference", needs.reference, "reference set", "--hold-on or --method"),
        ("reference_changes", made, "made images", "--reference, --hold-on or --method"),
        ("reference_batch_size", needs.reference, "reference set", "--hold-on or --method"),
        ("vocabulary", words, "vocabulary", "--anchors or --method"),
        ("anchors_per_step", bool(needs.anchors), "text anchors", "--anchors or --method"),
    )
    return {
        name: (what, change)
        for name, used, what, change in known
        if getattr(config, name) not in (None, getattr(RunConfig, name)) and not used
    }
