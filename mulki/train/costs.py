"""What a run is going to cost, measured on a few steps of each task. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from mulki.clip.evaluation import tested_texts
from mulki.clip.models import TEXT_BATCH, VisionLanguageModel
from mulki.clip.texts import text_features, text_inputs
from mulki.data import Task
from mulki.data.subset import sampled
from mulki.data.transforms import is_deterministic
from mulki.train.config.run_config import AUTO
from mulki.train.config.tasks import needs_of
from mulki.train.display.outline import images_of_head, rows
from mulki.train.learning.batches import kept_samples
from mulki.train.learning.inputs import Listeners, StepReport
from mulki.train.learning.learn import steps_of
from mulki.train.learning.memory import MicroBatch, free_memory, local, peak_memory
from mulki.train.learning.validation import validations
from mulki.train.rows import test_loader
from mulki.train.start.setup import Setup
from mulki.train.task_learner import TaskLearner

# Steps that a time is the median of.
_STEPS = 3
# A gradient and the two moments of AdamW.
_OF_A_PARAMETER = 3


@dataclass(frozen=True)
class TaskCosts:
    """What one task takes, in seconds.

    Args:
        name: of the task.
        train, test: its images.
        classes: C.
        steps: optimiser steps.
        prepare: before the first step, teachers that encode all training images included.
        first_step: of a step whose images come up for the first time; None without training.
        later_step: of one whose images came up before: the teachers have encoded them, and a cache
            may hold them.
        learning: of all its steps and what is before them.
        testing: of testing it at the start.
        testing_again: of testing it after a task, which is done after every task.
    """

    name: str
    train: int
    test: int
    classes: int
    steps: int = 0
    prepare: float = 0.0
    first_step: float | None = None
    later_step: float | None = None
    learning: float = 0.0
    testing: float = 0.0
    testing_again: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What a run takes. Sizes are in bytes, times in seconds.

    Args:
        parameters: of the model.
        trainable: those that train.
        stored: parameters that the checkpoint of a task holds; 0 without checkpoints.
        stored_bytes: their size.
        models: memory of student and teachers.
        training: memory of gradients, of the optimiser, and of weights with their adapters.
        teacher_features: memory of what the teachers keep of the largest task.
        image: memory that the graph of an image takes; None without training, as below.
        free: memory that is free before the run; None if that is not known.
        peak: the most that was in use so far; None if that is not known.
        batch: images of a step in each process.
        largest: images that fit at a time; None if that is not known.
        tasks: of each task.
        seconds: of the whole run.
    """

    parameters: int
    trainable: int
    stored: int
    stored_bytes: int
    models: int
    training: int
    teacher_features: int
    image: int | None
    free: int | None
    peak: int | None
    batch: int
    largest: int | None
    tasks: tuple[TaskCosts, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def measure(setup: Setup, says: Callable[[str], None] = lambda words: None) -> Costs:
    """Learn a few steps of each task of a run, and test some of its images.

    The model of `setup` is another one afterwards. All processes of a run have to call it.

    Args:
        setup: without a run folder, see `mulki.train.start.setup.prepared`.
        says: called with a line on what is measured next.

    Raises:
        InputError: what the run itself would raise in these steps.
    """
    model, trains = setup.model, setup.method.trains
    free = free_memory(setup.precision.device)
    adapters = model.adapters
    stored = model.checkpoint() if trains and setup.config.save_checkpoints else {}
    if stored and adapters is not None:
        stored |= {f"adapters of {name}": value for name, value in adapters.state().items()}
    stored_sizes = (
        sum(value.numel() for value in stored.values()),
        sum(value.nbytes for value in stored.values()),
    )
    counts = model.parameter_counts()[:2]
    learner = TaskLearner(setup) if trains else None
    trainable = model.trainable().values()  # those that are left where the model was sharded
    frozen = {} if learner is None else learner.frozen
    used = bytes_of([model, *frozen.values()])
    fits: list[MicroBatch] = []
    tasks = []
    width = kept = 0
    again_each = 0.0
    for index, task in enumerate(setup.tasks):
        if index < setup.earlier:
            if len(task.test):
                again_each += _testing(setup, task)[1]
            continue
        says(f"measuring task {index + 1} of {len(setup.tasks)}, {task.name}")
        costs = _learning(setup, learner, index, task, fits.append)
        testing, again, width = _testing(setup, task)
        if for_head := images_of_head(setup, task):
            # Class statistics take as long for an image as its test does, in the same precision.
            passed = testing * for_head / len(task.test)
            costs = replace(costs, learning=costs.learning + passed)
        if task.val is not None:
            passed = again * len(task.val) / len(task.test)
            passed *= validations(setup.config, task, costs.steps)
            costs = replace(costs, learning=costs.learning + passed)
        tasks.append(replace(costs, testing=testing, testing_again=again))
        kept = max(kept, stored_rows(setup, task, costs.steps))
    tested = sum(each.testing for each in tasks) + again_each
    if trains:
        again_each += sum(each.testing_again for each in tasks)
        tested += (len(rows(setup)) - 1) * again_each
    training = _OF_A_PARAMETER * sum(local(p).nbytes for p in trainable)
    if adapters is not None and not setup.config.grad_checkpointing:
        training += adapters.bytes_in_a_step
    if adapters is not None and setup.method.needs.directions:
        training += adapters.bytes_of_directions
    known = [fit.largest for fit in fits if fit.largest is not None]
    teachers = {id(each) for each in frozen.values()}
    return Costs(
        *counts,
        *stored_sizes,
        models=used,
        training=training if trains else 0,
        teacher_features=len(teachers) * kept * width * torch.float32.itemsize,
        image=max((fit.per_sample for fit in fits), default=None),
        free=free,
        peak=peak_memory(setup.precision.device),
        batch=setup.config.batch_size,
        largest=min(known, default=None),
        tasks=tuple(tasks),
        seconds=sum(each.learning for each in tasks) + tested,
    )


def _learning(
    setup: Setup,
    learner: TaskLearner | None,
    index: int,
    task: Task,
    measured: Callable[[MicroBatch], None],
) -> TaskCosts:
    config, world = setup.config, setup.world
    costs = TaskCosts(task.name, len(task.train), len(task.test), len(task.classes))
    if learner is None:
        return costs
    batch = config.batch_size * world.size
    small = sampled(task, _STEPS * batch)
    once = max(len(small.train) // batch, 1)
    reports: list[StepReport] = []
    began: list[float] = []
    encoded: list[float] = []
    heard: list[float] = []

    def listen(report: StepReport) -> None:
        if not reports:
            began.append(time.perf_counter() - report.seconds)
        reports.append(report)
        heard.append(time.perf_counter())

    started = time.perf_counter()
    learner.learn(
        index,
        small,
        Listeners(listen, lambda images: encoded.append(time.perf_counter()), measured),
        config=replace(
            config,
            iterations=once + _STEPS,
            epochs=None,
            micro_batch=config.micro_batch or AUTO,
            val_every=0,
        ),
    )
    # What a method measures at the end of a task, on some of its images.
    at_end = time.perf_counter() - heard[-1]
    if measured_on := needs_of(setup.method, task).fisher:
        wanted, some = (min(measured_on, len(each.train)) for each in (task, small))
        at_end *= wanted / some
    of_images = encoded[-1] - started if encoded else 0.0
    others = began[0] - started - of_images
    every = len(task.train) / len(small.train)
    if needs_of(setup.method, task).directions:
        at_end, others = every * at_end, every * others
    prepare = max(others, 0.0) + of_images * every
    seconds = [report.seconds for report in reports]
    first, later = median(seconds[:once]), median(seconds[once:])
    steps = steps_of(config, len(task.train), world.size)
    new = min(steps, -(-len(task.train) // batch)) if is_deterministic(setup.transform) else 0
    learning = prepare + new * first + (steps - new) * later + at_end
    return replace(
        costs,
        steps=steps,
        prepare=prepare,
        first_step=first,
        later_step=later,
        learning=learning,
    )


@torch.no_grad()
def _testing(setup: Setup, task: Task) -> tuple[float, float, int]:
    # Seconds of testing a task at first and later, and the width of the features.
    model, world = setup.tested, setup.world
    model.eval()
    prompts = [prompt for of_class in tested_texts(task) for prompt in of_class]
    some = prompts[: TEXT_BATCH * world.size]
    inputs = text_inputs(model, some, world)
    started = time.perf_counter()
    features = text_features(model, inputs, world)
    float(features.sum())  # so that a device has done its work
    texts = (time.perf_counter() - started) * len(prompts) / len(some)
    small = sampled(task, setup.config.batch_size_eval * world.size)
    loader = test_loader(setup, small)

    def seconds() -> float:
        started = time.perf_counter()
        for images, *_ in loader:
            float(model.encode_images(images).sum())
        return texts + (time.perf_counter() - started) * len(task.test) / len(small.test)

    first = seconds()
    # Later the images are read again, unless a cache holds them.
    again = seconds() if getattr(loader.dataset, "cached", False) else first
    return first, again, features.shape[1]


def stored_rows(setup: Setup, task: Task, steps: int) -> int:
    """Rows of features that each teacher keeps of a task that is learned in so many steps."""
    needs = needs_of(setup.method, task)
    if not (setup.method.trains and needs.teachers):
        return 0
    reference = setup.reference_of(task) if needs.reference else None
    images, pairs = kept_samples(setup, task, reference, steps)
    of_images = images or 0 if needs.teacher_images else 0
    return of_images + (2 if needs.captions else 1) * (pairs or 0)


def bytes_of(models: Iterable[VisionLanguageModel]) -> int:
    """Of the weights and buffers of models; what several of them share counts once."""
    distinct = {
        id(tensor): local(tensor).nbytes
        for model in models
        for tensor in (*model.clip.parameters(), *model.clip.buffers())
    }
    return sum(distinct.values())
