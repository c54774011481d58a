"""Learning one task: teachers, batches, steps. The only place where encoders run in training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mulki.data.loader import batches, cycle
from mulki.data.task import Task
from mulki.data.transforms import is_deterministic
from mulki.engine import schedule
from mulki.engine.config import RunConfig
from mulki.engine.precision import Precision
from mulki.errors import InputError
from mulki.features import Features
from mulki.methods import ZERO_SHOT, Method, TaskStart
from mulki.models import TEXT_BATCH, VisionLanguageModel
from mulki.prototypes import class_means
from mulki.teachers import Teacher

Transform = Callable[..., Tensor]


@dataclass(frozen=True)
class StepReport:
    """What a step tells whoever listens.

    Args:
        step: its number in the task, from 1.
        losses: its terms by name.
        lr: the learning rate.
        images: images in its batch.
        seconds: since the step before, loading included.
    """

    step: int
    losses: Mapping[str, float]
    lr: float
    images: int
    seconds: float


def steps_of(config: RunConfig, num_images: int) -> int:
    """Optimiser steps for a task with that many training images."""
    if config.epochs is None:
        return config.iterations
    return max(1, math.ceil(config.epochs * num_images / config.batch_size))


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
    listen: Callable[[StepReport], None] = lambda report: None,
) -> int:
    """Train the model on one task, in place, with each class's first prompt as its text.

    Args:
        model: the student; its trainable parameters move.
        frozen: the models behind `method.needs.teachers` (and the original one for prototypes), by
            the names in `mulki.methods`; names may share a model.
        index: the task's place in the sequence, from 0.
        transform: of the training images.
        precision: how the encoders compute.
        listen: called after every step.

    Returns:
        The number of steps taken.

    Raises:
        InputError: a loss is not finite (the learning rate is then too high), or a bad image.
    """
    steps = steps_of(config, len(task.train))
    deterministic = is_deterministic(transform)
    prompts = [of_class[0] for of_class in task.prompts()]
    teachers, prototypes = _teachers(
        method, task, prompts, frozen, config, deterministic, precision
    )
    method.start_task(TaskStart(index, len(task.classes), steps, model.trainable(), prototypes))
    method.to(model.device)
    # As in open_clip: gains, biases and the like do not decay.
    weights = [*model.trainable().values()]
    decays = [p for p in weights if p.ndim >= 2]
    rest = [p for p in weights if p.ndim < 2] + [*method.parameters()]
    groups: list[dict[str, Any]] = [{"params": decays}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.wd,
    )
    loader = batches(
        task.train,
        transform,
        config.batch_size,
        shuffle=True,
        seed=config.seed + 7919 * index,
        workers=config.workers,
        drop_last=True,
        cached=deterministic,
    )
    text_inputs = model.text_inputs(prompts)
    model.train()
    ended = time.perf_counter()
    for step, (images, target, places) in zip(range(1, steps + 1), cycle(loader), strict=False):
        rate = config.lr * schedule.factor(config.lr_scheduler, step - 1, steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, target = images.to(model.device), target.to(model.device)
        said = {t: _ask(t, m, places, images, precision) for t, m in dict(teachers).items()}
        answers = tuple(said[t] for t, _ in teachers)
        with precision.autocast():
            image_features = model.encode_images(images)
            text_features = model.encode_texts(text_inputs)
        student = Features(image_features, text_features, model.logit_scale, method.prototypes())
        losses = {**method.losses(student, answers, target), **method.penalties()}
        terms = torch.stack([value.reshape(()) for value in losses.values()])
        # One read from the device for all terms of a step.
        values = dict(zip(losses, terms.tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            raise InputError(
                f"--lr {config.lr:g}: the loss is not finite at step {step} of task {task.name} "
                f"({shown}); lower it"
            )
        _descend(terms.sum(), optimizer, decays + rest, config, precision)
        method.after_step(step)
        started, ended = ended, time.perf_counter()
        listen(StepReport(step, values, rate, len(images), ended - started))
    method.end_task()
    model.eval()
    return steps


def _descend(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    config: RunConfig,
    precision: Precision,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    scaler = precision.scaler
    scaler.scale(loss).backward()
    if config.grad_clip_norm is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip_norm)
    scaler.step(optimizer)
    scaler.update()


@torch.no_grad()
def _ask(
    teacher: Teacher,
    model: VisionLanguageModel,
    places: Tensor,
    images: Tensor,
    precision: Precision,
) -> Features:
    def encode(batch: Tensor) -> Tensor:
        with precision.autocast():
            return model.encode_images(batch)

    return teacher.features(places, images, encode)


@torch.no_grad()
def _teachers(
    method: Method,
    task: Task,
    prompts: list[str],
    frozen: Mapping[str, VisionLanguageModel],
    config: RunConfig,
    deterministic: bool,
    precision: Precision,
) -> tuple[list[tuple[Teacher, VisionLanguageModel]], Tensor | None]:
    # One Teacher per distinct model: at the first task both names mean the original.
    needs = method.needs
    names = [*needs.teachers, *([ZERO_SHOT] if needs.prototypes else [])]
    asked = list({id(frozen[name]): frozen[name] for name in names}.values())
    whole: list[Tensor] = []
    if needs.prototypes:
        whole, target = _encode_training_set(asked, task, config, precision)
    made: dict[int, Teacher] = {}
    for place, model in enumerate(asked):
        inputs = model.text_inputs(prompts)
        with precision.autocast():
            texts = torch.cat([model.encode_texts(part) for part in inputs.split(TEXT_BATCH)])
        prototypes = class_means(whole[place], target, len(task.classes)) if whole else None
        teacher = Teacher(
            texts, model.logit_scale, prototypes, len(task.train) if deterministic else None
        )
        if whole:
            teacher.remember(whole[place])
        made[id(model)] = teacher
    teachers = [(made[id(frozen[name])], frozen[name]) for name in needs.teachers]
    original = made[id(frozen[ZERO_SHOT])].prototypes if needs.prototypes else None
    return teachers, original


def _encode_training_set(
    models: Sequence[VisionLanguageModel], task: Task, config: RunConfig, precision: Precision
) -> tuple[list[Tensor], Tensor]:
    # Features [n, D] of each model, and targets [n]: one pass, since decoding costs as much as a
    # small encoder. With the evaluation transform, which equals the training transform when that
    # is deterministic.
    loader = batches(
        task.train,
        models[0].preprocess,
        config.batch_size_eval,
        shuffle=False,
        seed=config.seed,
        workers=config.workers,
    )
    features: list[list[Tensor]] = [[] for _ in models]
    targets = []
    for images, target, _ in loader:
        for model, of_model in zip(models, features, strict=True):
            with precision.autocast():
                of_model.append(model.encode_images(images))
        targets.append(target)
    return [torch.cat(parts) for parts in features], torch.cat(targets).to(models[0].device)
