"""Learning one task: its teachers, its batches, its steps."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from mulki.clip.models import VisionLanguageModel
from mulki.data.caption_task import CaptionTask
from mulki.errors import InputError
from mulki.methods import TaskStart
from mulki.methods.base import AdaptedWeight
from mulki.train.config.rates import factor, learning_rates
from mulki.train.config.run_config import RunConfig
from mulki.train.config.tasks import needs_of
from mulki.train.learning.batches import Batch, PairBatch, task_batches
from mulki.train.learning.class_step import ClassStep, Step
from mulki.train.learning.directions import input_moments, mean_gradients
from mulki.train.learning.fisher import fisher_diagonal
from mulki.train.learning.inputs import Listeners, StepReport, TaskInputs, Training
from mulki.train.learning.pair_step import PairStep
from mulki.train.learning.spikes import SpikeGuard
from mulki.train.learning.task_teachers import TaskTeachers
from mulki.train.learning.validation import Validation, validates
from mulki.train.randomness import random_state, set_random_state
from mulki.train.saving.recovery import Saves, restore_method

_log = logging.getLogger(__name__)


def steps_of(config: RunConfig, num_images: int, processes: int = 1) -> int:
    """Optimiser steps for a task with that many training images."""
    if config.epochs is None:
        return config.iterations
    # Fewer images than a batch are one of them.
    batch = max(1, min(config.batch_size * processes, num_images))
    return max(1, math.ceil(config.epochs * num_images / batch))


def learn_task(
    training: Training,
    inputs: TaskInputs,
    listeners: Listeners | None = None,
    saves: Saves | None = None,
    saved: Mapping[str, Any] | None = None,
) -> int:
    """Train the model on one task, in place, with each class's first prompt as its text.

    A task of captions has the captions themselves.

    Args:
        training: the student and how it is trained.
        inputs: the task and what the method needs to learn it.
        listeners: called while the task is learned.
        saves: of the run; none by default.
        saved: the state within this task to go on from. The weights of the student and of the
            frozen models are those of that moment already.

    Returns:
        The number of steps that were taken.

    Raises:
        InputError: a loss is not finite (the learning rate is then too high), or a bad image.
        ValueError: a reference set or anchors without need, or the reverse.
    """
    listeners = listeners or Listeners()
    saves = saves or Saves(None, used=False)
    inputs.check(training.method)
    learning = _Learning(training, inputs, listeners, saved)
    with saves.within_task(learning.state) as whole_step:
        while learning.goes_on:
            listeners.step(learning.take_step(whole_step, saves))
            learning.listened = time.perf_counter()
        # What takes time is done where a signal or an error makes a save, and may be done twice.
        if learning.validation is not None:
            learning.validation.keep_best()
        needs = needs_of(training.method, inputs.task)
        moments = input_moments(training, inputs) if needs.directions else None
        fisher = fisher_diagonal(training, inputs, needs.fisher) if needs.fisher else None
    with saves.signals.held():
        learning.guard.report(inputs.task.name)
        if moments is not None:
            training.method.keep_moments(moments)
        if fisher is not None:
            training.method.keep_fisher(fisher)
        training.method.end_task()
        training.model.eval()
    return learning.steps


class _Learning:
    """The learning of one task, and what changes in it from step to step.

    Attributes:
        steps: that were taken.
        last: number of the last step.
        listened: when the listener of the last step came back.
    """

    def __init__(
        self,
        training: Training,
        inputs: TaskInputs,
        listeners: Listeners,
        saved: Mapping[str, Any] | None,
    ):
        config, task = training.config, inputs.task
        self.training, self.task, self.anchors = training, task, inputs.anchors
        self.steps, self.last = 0, steps_of(config, len(task.train), training.world.size)
        self.lr = learning_rates(config.lr_of).get(task.name, config.lr)
        self.guard = SpikeGuard(config.spike_guard)
        self.teachers = TaskTeachers.prepare(training, inputs, self.last, listeners.encoded)
        self._start_method(inputs, saved)
        kind = PairStep if isinstance(task, CaptionTask) else ClassStep
        self.step: Step = kind(training, inputs, self.teachers, listeners.micro_batch)
        if saved is not None:
            self._restore(saved)
        self.device = training.model.device
        self.validation: Validation | None = None
        if validates(config, task):
            self.validation = Validation(training, task, self.last)
            if saved is not None:
                self.validation.restore(saved["validation"])
        self.batches = task_batches(training, inputs, self.steps)
        training.model.train()
        if saved is not None:
            set_random_state(saved["random"], self.device)
        self.ended = self.listened = time.perf_counter()

    @property
    def goes_on(self) -> bool:
        """Whether there is another step to take."""
        stopped = self.validation is not None and self.validation.stopped
        return self.steps < self.last and not stopped

    def _start_method(self, inputs: TaskInputs, saved: Mapping[str, Any] | None) -> None:
        method, model = self.training.method, self.training.model
        gradients = None
        if saved is None and needs_of(method, inputs.task).directions:
            gradients = mean_gradients(self.training, inputs)
        if saved is not None:
            restore_method(method, saved["method"])
        classes, prototypes = len(inputs.task.classes), self.teachers.prototypes
        # What the method draws is the same in all processes.
        random = random_state(model.device)
        mixed = np.random.SeedSequence((self.training.config.seed, inputs.index + 1))
        torch.manual_seed(int(mixed.generate_state(1)[0]))
        method.start_task(
            TaskStart(
                inputs.index,
                classes,
                self.last,
                model.trainable(),
                prototypes,
                _adapted(model) if needs_of(method, inputs.task).directions else {},
                gradients,
            )
        )
        set_random_state(random, model.device)
        method.to(model.device)

    def take_step(
        self, whole_step: Callable[[int], AbstractContextManager[None]], saves: Saves
    ) -> StepReport:
        """Take the next step.

        Args:
            whole_step: from `Saves.within_task`.
            saves: where the state goes if a loss is not finite.
        """
        number, config = self.steps + 1, self.training.config
        batch = next(self.batches)
        loaded = time.perf_counter()
        before = self._drawn()
        with whole_step(number):
            losses = self.step.gradients(batch)
            derived = time.perf_counter()
            if not all(map(math.isfinite, losses.values())):
                # The weights are still those of the step before. All processes have the losses of
                # the whole batch, so all of them come here.
                self._undo(before)
                with contextlib.suppress(OSError, InputError):
                    saves.save(self.state())
                raise self._not_finite(losses, batch, number)
            lr = self.lr * factor(config.lr_scheduler, number - 1, self.last, config.warmup)
            self._update(number, losses, lr)
            updated = time.perf_counter()
            if self.validation is not None:
                self.validation.after_step(number)
        parts = {
            "loading": loaded - self.listened,
            "gradients": derived - loaded,
            "update": updated - derived,
        }
        started, self.ended = self.ended, time.perf_counter()
        return StepReport(number, losses, lr, len(batch.places), self.ended - started, parts)

    def _update(self, number: int, losses: Mapping[str, float], lr: float) -> None:
        # Moves the weights, unless the losses are a spike.
        if self.guard.allows(sum(losses.values()), number):
            self.step.update(lr)
        self.training.method.after_step(number)
        self.steps = number

    def _drawn(self) -> dict[str, Any]:
        # What the losses of a batch change: the methods replace their state, so none is copied.
        return {
            "random": random_state(self.device),
            "method": self.training.method.state_dict(),
            "anchors": None if self.anchors is None else self.anchors.state(),
        }

    def _undo(self, drawn: Mapping[str, Any]) -> None:
        # Sets what `_drawn` returned. The first losses of a method may have made a part of it.
        set_random_state(drawn["random"], self.device)
        restore_method(self.training.method, drawn["method"])
        if self.anchors is not None:
            self.anchors.restore(drawn["anchors"])

    def state(self) -> dict[str, Any]:
        """What a save within the task holds."""
        return {
            "steps": self.steps,
            "method": self.training.method.state_dict(),
            "step": self.step.state(),
            "teachers": self.teachers.state(),
            "spikes": self.guard.state(),
            "validation": None if self.validation is None else self.validation.state(),
            "anchors": None if self.anchors is None else self.anchors.state(),
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self.steps = saved["steps"]
        restore_method(self.training.method, saved["method"], strict=True)
        self.step.restore(saved["step"])
        self.teachers.restore(saved["teachers"])
        self.guard.restore(saved["spikes"])
        if self.anchors is not None:
            self.anchors.restore(saved["anchors"])

    def _not_finite(
        self, losses: Mapping[str, float], batch: Batch | PairBatch, number: int
    ) -> InputError:
        task = self.task
        names = [task.train.name(place) for place in batch.places.tolist()]
        _log.info("images of step %d of task %s: %s", number, task.name, ", ".join(names))
        bad = ", ".join(name for name, value in losses.items() if not math.isfinite(value))
        shown = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
        return InputError(
            f"--lr {self.lr:g}: {bad} is not finite at step {number} of task {task.name} "
            f"({shown}); start another run with a lower one"
        )


def _adapted(model: VisionLanguageModel) -> dict[str, AdaptedWeight]:
    assert model.adapters is not None
    found = model.adapters.weights()
    return {n: AdaptedWeight(of.frozen.flatten(1), of.a, of.b) for n, of in found.items()}
