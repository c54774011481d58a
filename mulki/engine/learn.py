"""Learning one task: batches and steps. Only here, in `teaching` and in evaluation encoders run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mulki.data.loader import batch_sizes, batches, cycle
from mulki.data.task import Task
from mulki.data.transforms import is_deterministic
from mulki.engine import memory, schedule
from mulki.engine.config import AUTO, RunConfig
from mulki.engine.distributed import World, processes_here, text_inputs
from mulki.engine.microbatch import Encoder, backward
from mulki.engine.precision import Precision
from mulki.engine.teaching import Faculty
from mulki.errors import InputError
from mulki.features import Features
from mulki.methods import Method, TaskStart
from mulki.models import VisionLanguageModel

Transform = Callable[..., Tensor]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What a step tells whoever listens.

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
    world: World | None = None,
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
        world: the processes that learn together, each with `config.batch_size` images of a batch.
        listen: called after every step.

    Returns:
        The number of steps taken.

    Raises:
        InputError: a loss is not finite (the learning rate is then too high), or a bad image.
    """
    world = world or World()
    steps = steps_of(config, len(task.train), world.size)
    deterministic = is_deterministic(transform)
    prompts = [of_class[0] for of_class in task.prompts()]
    faculty = Faculty.assemble(
        method, task, prompts, frozen, config, precision, world, deterministic=deterministic
    )
    method.start_task(
        TaskStart(index, len(task.classes), steps, model.trainable(), faculty.prototypes)
    )
    method.to(model.device)
    optimizer = _optimizer(model, method, config)
    loader = batches(
        task.train,
        transform,
        config.batch_size * world.size,
        shuffle=True,
        seed=config.seed + 7919 * index,
        workers=config.workers,
        drop_last=True,
        cached=deterministic,
        pin_memory=model.device.type == "cuda",
        share=world.rows,
    )
    count = batch_sizes(loader)[0]
    class_texts = text_inputs(model, prompts, world)
    model.train()
    micro_batch: int | None = None
    ended = time.perf_counter()
    for step, (images, target, places) in zip(range(1, steps + 1), cycle(loader), strict=False):
        rate = config.lr * schedule.factor(config.lr_scheduler, step - 1, steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if micro_batch is None:
            micro_batch = _micro_batch(config, model, method, precision, images, world)
        if micro_batch == len(images):
            images = images.to(model.device, non_blocking=True)
        # Otherwise they stay on the host, each micro-batch is moved when it is encoded, and what a
        # step takes of the device does not grow with its batch.
        target, places = _of_all(target, places, count, model.device, world)
        answers = faculty.answers(images, places, count, micro_batch)
        losses = _gradients(
            model,
            method,
            images,
            class_texts,
            answers,
            target,
            micro_batch=micro_batch,
            precision=precision,
            world=world,
        )
        # One read from the device for all terms of a step.
        terms = torch.stack([value.reshape(()) for value in losses.values()])
        values = dict(zip(losses, terms.tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            raise InputError(
                f"--lr {config.lr:g}: the loss is not finite at step {step} of task {task.name} "
                f"({shown}); lower it"
            )
        _descend(optimizer, config, precision, world)
        method.after_step(step)
        started, ended = ended, time.perf_counter()
        listen(StepReport(step, values, rate, count, ended - started))
    method.end_task()
    model.eval()
    return steps


def _optimizer(
    model: VisionLanguageModel, method: Method, config: RunConfig
) -> torch.optim.Optimizer:
    # As in open_clip: gains, biases and the like do not decay. Sharded parameters stay apart, since
    # no fused update takes both kinds.
    weights = [*model.trainable().values()]
    rest = [p for p in weights if p.ndim < 2] + [*method.parameters()]
    groups: list[dict[str, Any]] = []
    for decay, parameters in ((config.wd, [p for p in weights if p.ndim >= 2]), (0.0, rest)):
        for sharded in (False, True):
            members = [p for p in parameters if isinstance(p, DTensor) == sharded]
            groups += [{"params": members, "weight_decay": decay}] if members else []
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=model.device.type in ("cpu", "cuda"),
    )


def _micro_batch(
    config: RunConfig,
    model: VisionLanguageModel,
    method: Method,
    precision: Precision,
    images: Tensor,
    world: World,
) -> int:
    if config.micro_batch is None:
        return len(images)
    if config.micro_batch != AUTO:
        return min(int(config.micro_batch), len(images))

    def encode(part: Tensor) -> Tensor:
        with precision.autocast():
            return model.encode_images(part)

    device = model.device
    free = memory.free_memory(device)
    if free is not None and device.type == "cpu":
        free //= processes_here()
    found = memory.fitting_micro_batch(
        encode,
        images,
        [*model.trainable().values(), *method.parameters()],
        free,
        # Without memory left in one process, the others would wait for it in a sharded encoder.
        tried=device.type != "cpu" and not config.fsdp,
        smallest=lambda number: world.smallest(number, device),
    )
    _log.info("--micro-batch auto: %d of %d images at a time (%s)", found.size, len(images), found)
    return found.size


def _of_all(
    target: Tensor, places: Tensor, count: int, device: torch.device, world: World
) -> tuple[Tensor, Tensor]:
    # Targets on the device, places on the CPU, both [count].
    if world.size == 1:
        return target.to(device, non_blocking=True), places
    both = world.gather(torch.stack([target, places], dim=1).to(device), count)
    return both[:, 0].contiguous(), both[:, 1].cpu()


def _gradients(
    model: VisionLanguageModel,
    method: Method,
    images: Tensor,
    class_texts: Tensor,
    answers: tuple[Features, ...],
    target: Tensor,
    *,
    micro_batch: int,
    precision: Precision,
    world: World,
) -> Mapping[str, Tensor]:
    # Terms of the loss, detached; the gradients are in `.grad`, averaged over all processes.
    def encode_images(part: Tensor) -> Tensor:
        with precision.autocast():
            return model.encode_images(part)

    def encode_texts(part: Tensor) -> Tensor:
        with precision.autocast():
            return model.encode_texts(part)

    def losses(image_features: Tensor, text_features: Tensor) -> Mapping[str, Tensor]:
        student = Features(
            world.gather(image_features, len(target)),
            world.gather(text_features, len(class_texts)),
            model.logit_scale,
            method.prototypes(),
        )
        return {**method.losses(student, answers, target), **method.penalties()}

    parameters = [*model.trainable().values(), *method.parameters()]
    for parameter in parameters:
        parameter.grad = None
    terms = backward(
        losses,
        Encoder(encode_images, (images,)),
        Encoder(encode_texts, (world.part(class_texts),), split=False),
        micro_batch=micro_batch,
        scaler=precision.scaler,
    )
    assert isinstance(terms, Mapping)
    world.average(parameters)
    return terms


def _descend(
    optimizer: torch.optim.Optimizer, config: RunConfig, precision: Precision, world: World
) -> None:
    scaler = precision.scaler
    if config.grad_clip_norm is not None:
        scaler.unscale_(optimizer)
        _clip([group["params"] for group in optimizer.param_groups], config.grad_clip_norm)
    scaler.step(optimizer)
    scaler.update()


def _clip(groups: Sequence[Sequence[nn.Parameter]], largest: float) -> None:
    # Sharded and whole parameters have their norms taken apart: no operation takes both.
    norms = []
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, largest, total)
