"""Learning one task: its teachers, its batches, its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mulki.data.loader import batch_sizes, batches, cycle
from mulki.data.task import ImageSet, Task
from mulki.data.transforms import is_deterministic
from mulki.engine import schedule
from mulki.engine.config import RunConfig
from mulki.engine.precision import Precision
from mulki.engine.step import Batch, Step
from mulki.engine.teachers import TaskTeachers
from mulki.errors import InputError
from mulki.methods import Method, TaskStart
from mulki.models import VisionLanguageModel
from mulki.texts import text_inputs
from mulki.world import ALONE, World

Transform = Callable[..., Tensor]


@dataclass(frozen=True)
class StepReport:
    """What is known of a step after it.

    Args:
        step: its number in the task, from 1.
        losses: its terms by name.
        lr: the learning rate.
        images: images in its batch, those of all processes.
        seconds: since the step before, loading included.
    """

    step: int
    losses: Mapping[str, float]
    lr: float
    images: int
    seconds: float


def steps_of(config: RunConfig, num_images: int, processes: int = 1) -> int:
    """Optimiser steps for a task with that many training images."""
    if config.epochs is None:
        return config.iterations
    return max(1, math.ceil(config.epochs * num_images / (config.batch_size * processes)))


def learn_task(
    model: VisionLanguageModel,
    method: Method,
    task: Task,
    frozen: Mapping[str, VisionLanguageModel],
    config: RunConfig,
    *,
    index: int,
    transform: Transform,
    precision: Precision,
    world: World = ALONE,
    listen: Callable[[StepReport], None] = lambda report: None,
) -> int:
    """Train the model on one task, in place, with each class's first prompt as its text.

    Args:
        model: the student; its trainable parameters move.
        frozen: the models behind `method.needs.teachers` (and the original one for prototypes), by
            the names in `mulki.methods`; names may mean the same model.
        index: the task's place in the sequence, from 0.
        transform: of the training images.
        precision: how the encoders compute.
        world: the processes that learn together, each with `config.batch_size` images of a batch.
        listen: called after every step.

    Returns:
        The number of steps taken.

    Raises:
        InputError: a loss is not finite (the learning rate is then too high), or a bad image.
    """
    steps = steps_of(config, len(task.train), world.size)
    prompts = [of_class[0] for of_class in task.prompts()]
    teachers = TaskTeachers.prepare(
        method.needs,
        task,
        prompts,
        frozen,
        config,
        precision,
        world,
        deterministic=is_deterministic(transform),
    )
    method.start_task(
        TaskStart(index, len(task.classes), steps, model.trainable(), teachers.prototypes)
    )
    method.to(model.device)
    class_texts = text_inputs(model, prompts, world)
    step = Step(model, method, teachers, class_texts, config, precision, world)
    seed = config.seed + 7919 * index
    model.train()
    ended = time.perf_counter()
    for number, batch in enumerate(
        _batches(task.train, transform, config, steps, model.device, world, seed), start=1
    ):
        losses = step.gradients(batch)
        if not all(map(math.isfinite, losses.values())):
            shown = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
            raise InputError(
                f"--lr {config.lr:g}: the loss is not finite at step {number} of task {task.name} "
                f"({shown}); lower it"
            )
        lr = config.lr * schedule.factor(config.lr_scheduler, number - 1, steps, config.warmup)
        step.update(lr)
        method.after_step(number)
        started, ended = ended, time.perf_counter()
        listen(StepReport(number, losses, lr, len(batch.target), ended - started))
    method.end_task()
    model.eval()
    return steps


def _batches(
    images: ImageSet,
    transform: Transform,
    config: RunConfig,
    steps: int,
    device: torch.device,
    world: World,
    seed: int,
) -> Iterator[Batch]:
    loader = batches(
        images,
        transform,
        config.batch_size * world.size,
        shuffle=True,
        seed=seed,
        workers=config.workers,
        drop_last=True,
        cached=is_deterministic(transform),
        pin_memory=device.type == "cuda",
        part=world.rows,
    )
    count = batch_sizes(loader)[0]
    for _, (part, target, places) in zip(range(steps), cycle(loader), strict=False):
        if world.size == 1:
            yield Batch(part, target.to(device, non_blocking=True), places)
        else:
            both = world.gather(torch.stack([target, places], dim=1).to(device), count)
            yield Batch(part, both[:, 0].contiguous(), both[:, 1].cpu())
