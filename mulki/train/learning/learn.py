"""Learning one task: its teachers, its batches, its steps."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mulki.clip.models import VisionLanguageModel
from mulki.data.caption_task import CaptionTask
from mulki.data.reference import ReferenceSet
from mulki.data.task import Task
from mulki.distributed.world import ALONE, World
from mulki.errors import InputError
from mulki.methods import Method, Needs, TaskStart
from mulki.train.config import schedule
from mulki.train.config.precision import Precision
from mulki.train.config.rates import learning_rates
from mulki.train.config.run_config import RunConfig
from mulki.train.config.tasks import needs_of
from mulki.train.learning.anchor_texts import Anchors
from mulki.train.learning.batches import Batch, PairBatch, Transform, kept_samples, task_batches
from mulki.train.learning.class_step import ClassStep, Means, Step
from mulki.train.learning.memory import Fit
from mulki.train.learning.pair_step import PairStep
from mulki.train.learning.spikes import SpikeGuard
from mulki.train.learning.task_teachers import TaskTeachers
from mulki.train.saving.randomness import random_state, set_random_state
from mulki.train.saving.recovery import Saves

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What is known of a step after it.

    Args:
        step: its number in the task, from 1.
        losses: its terms by name.
        lr: the learning rate.
        images: images in its batch, those of all processes.
        seconds: since the step before, loading included.
        parts: of these seconds, those that waited for images (`loading`), took the features, the
            losses and their gradients (`gradients`), and moved the weights (`update`). A device
            that works ahead of the host does the last under the name of what comes after it. The
            rest is saves, and `listen` after the step before.
    """

    step: int
    losses: Mapping[str, float]
    lr: float
    images: int
    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)


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
    reference: ReferenceSet | None = None,
    anchors: Anchors | None = None,
    listen: Callable[[StepReport], None] = lambda report: None,
    prepared: Callable[[int], None] = lambda images: None,
    saves: Saves | None = None,
    saved: Mapping[str, Any] | None = None,
    fitted: Callable[[Fit], None] | None = None,
) -> int:
    """Train the model on one task, in place, with each class's first prompt as its text.

    A task of captions has the captions themselves.

    Args:
        model: the student; its trainable parameters move.
        frozen: the models behind `method.needs.teachers` (and the original one for prototypes), by
            the names in `mulki.methods`; names may mean the same model.
        index: the task's place in the sequence, from 0.
        transform: of the training images, and of those of the reference set.
        precision: how the encoders compute.
        world: the processes that learn together, each with `config.batch_size` images of a batch.
        reference: the images and captions that the method needs if `method.needs.reference`.
        anchors: the texts that the method needs if it has `method.needs.anchors`.
        listen: called after every step.
        prepared: called with the number of training images that the teachers have just encoded,
            where they encode them before the first step.
        saves: of the run; none by default.
        saved: the state within this task to go on from. The weights of the student and of the
            frozen models are those of that moment already.
        fitted: called at the first step with the micro-batch that fits, which is then measured
            whatever the option says.

    Returns:
        The number of steps of the task.

    Raises:
        InputError: a loss is not finite (the learning rate is then too high), or a bad image.
        ValueError: a reference set or anchors without need, or the reverse.
    """
    needs = needs_of(method, task)
    _check_given(method, needs, reference, anchors)
    steps = steps_of(config, len(task.train), world.size)
    prompts = [of_class[0] for of_class in task.prompts()]
    teachers = TaskTeachers.prepare(
        needs,
        task,
        prompts,
        frozen,
        config,
        precision,
        world,
        kept=kept_samples(task, reference, transform, config, steps, world),
        num_anchors=len(anchors) if anchors is not None else 0,
        encoded=prepared,
    )
    if saved is not None:
        method.load_state_dict(saved["method"], strict=False)
    method.start_task(
        TaskStart(index, len(task.classes), steps, model.trainable(), teachers.prototypes)
    )
    method.to(model.device)
    means = Means(model, method, teachers, config, precision, world, fitted)
    step = _step_on(task, means, prompts, anchors)
    learning = _Learning(method, step, teachers, SpikeGuard(config.spike_guard), anchors)
    if saved is not None:
        learning.restore(saved)
    batches = task_batches(
        task, reference, transform, config, model.device, world, index=index, start=learning.steps
    )
    model.train()
    if saved is not None:
        set_random_state(saved["random"], model.device)
    lr = learning_rates(config.lr_of).get(task.name, config.lr)
    ended = listened = time.perf_counter()
    saves = saves or Saves(None, used=False)
    with saves.within_task(learning.state) as whole_step:
        for number in range(learning.steps + 1, steps + 1):
            batch, of_reference = next(batches)
            loaded = time.perf_counter()
            before = learning.drawn(model.device)
            with whole_step(number):
                losses = step.gradients(batch, of_reference)
                derived = time.perf_counter()
                problem = _problem_of(losses, batch, lr, task, number)
                if problem is not None:
                    # The weights are still those of the step before. All processes have the losses
                    # of the whole batch, so all of them come here.
                    learning.undo(before, model.device)
                    with contextlib.suppress(OSError, InputError):
                        saves.save(learning.state())
                    raise problem
                factor = schedule.factor(config.lr_scheduler, number - 1, steps, config.warmup)
                learning.update(number, losses, lr * factor)
                updated = time.perf_counter()
            parts = {
                "loading": loaded - listened,
                "gradients": derived - loaded,
                "update": updated - derived,
            }
            started, ended = ended, time.perf_counter()
            size = len(batch.places)
            listen(StepReport(number, losses, lr * factor, size, ended - started, parts))
            listened = time.perf_counter()
    learning.guard.report(task.name)
    method.end_task()
    model.eval()
    return steps


@dataclass
class _Learning:
    """What changes from step to step, and so belongs to a save within the task."""

    method: Method
    step: Step
    teachers: TaskTeachers
    guard: SpikeGuard
    anchors: Anchors | None
    steps: int = 0  # that were taken

    def update(self, number: int, losses: Mapping[str, float], lr: float) -> None:
        """Move the weights, unless the losses are a spike."""
        if self.guard.allows(sum(losses.values()), number):
            self.step.update(lr)
        self.method.after_step(number)
        self.steps = number

    def drawn(self, device: torch.device) -> dict[str, Any]:
        """What the losses of a batch change: the methods replace their state, so none is copied."""
        anchors = None if self.anchors is None else self.anchors.state()
        return {
            "random": random_state(device),
            "method": self.method.state_dict(),
            "anchors": anchors,
        }

    def undo(self, drawn: Mapping[str, Any], device: torch.device) -> None:
        """Set what `drawn` returned."""
        set_random_state(drawn["random"], device)
        # Its first losses may have made a part of the state.
        self.method.load_state_dict(drawn["method"], strict=False)
        if self.anchors is not None:
            self.anchors.restore(drawn["anchors"])

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "method": self.method.state_dict(),
            "step": self.step.state(),
            "teachers": self.teachers.state(),
            "spikes": self.guard.state(),
            "anchors": None if self.anchors is None else self.anchors.state(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.steps = saved["steps"]
        self.method.load_state_dict(saved["method"])
        self.step.restore(saved["step"])
        self.teachers.restore(saved["teachers"])
        self.guard.restore(saved["spikes"])
        if self.anchors is not None:
            self.anchors.restore(saved["anchors"])


def _check_given(
    method: Method, needs: Needs, reference: ReferenceSet | None, anchors: Anchors | None
) -> None:
    if (reference is None) == needs.reference:
        given = "None" if reference is None else "a reference set"
        wanted = "one" if needs.reference else "None"
        raise ValueError(f"reference: got {given}, wanted {wanted} for {type(method).__name__}")
    if (anchors is None) == bool(needs.anchors):
        given = "None" if anchors is None else f"{len(anchors)} texts"
        wanted = "those of the task" if needs.anchors else "None"
        raise ValueError(f"anchors: got {given}, wanted {wanted} for {type(method).__name__}")


def _step_on(task: Task, means: Means, prompts: Sequence[str], anchors: Anchors | None) -> Step:
    if isinstance(task, CaptionTask):
        return PairStep(means, task.train)
    return ClassStep(means, prompts, anchors)


def _problem_of(
    losses: Mapping[str, float], batch: Batch | PairBatch, lr: float, task: Task, number: int
) -> InputError | None:
    if all(map(math.isfinite, losses.values())):
        return None
    names = [task.train.name(place) for place in batch.places.tolist()]
    _log.info("images of step %d of task %s: %s", number, task.name, ", ".join(names))
    bad = ", ".join(name for name, value in losses.items() if not math.isfinite(value))
    shown = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
    return InputError(
        f"--lr {lr:g}: {bad} is not finite at step {number} of task {task.name} ({shown}); "
        "start another run with a lower one"
    )
