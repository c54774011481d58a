"""The best step of a task by the accuracy on its validation images, and when to stop early."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mulki.clip.evaluation import Evaluator
from mulki.data.loader import batches
from mulki.data.subset import held_back
from mulki.data.task import Task
from mulki.distributed.parts import set_whole
from mulki.errors import InputError
from mulki.methods import Method
from mulki.stages.connecting import snapshot
from mulki.train.config.run_config import RunConfig
from mulki.train.learning.inputs import Training

_log = logging.getLogger(__name__)

# Validations of a task where no number of steps between them is given.
_TIMES = 10


class Validation:
    """Tests a model on the validation images of the task that it learns, and keeps the best step.

    Args:
        training: the student and how it is trained.
        task: with validation images.
        steps: of the task.
    """

    def __init__(self, training: Training, task: Task, steps: int):
        config = training.config
        assert task.val is not None
        self._model, self._task, self._steps = training.model, task, steps
        self._every = _every(config, steps)
        self._patience = config.early_stopping
        loader = batches(
            task.val,
            training.model.preprocess,
            config.batch_size_eval * training.world.size,
            workers=config.workers,
            cached=True,
            part=training.world.rows,
        )
        # Among the classes of the task, with all prompts, as its test images are.
        tested = dataclasses.replace(task, test=task.val)
        self._evaluator = Evaluator(training.tested, [tested], [loader], training.world)
        self._best = -1.0
        self._best_step = 0
        self._since = 0
        self._weights: dict[str, Tensor] = {}

    @property
    def stopped(self) -> bool:
        """Whether there have been as many validations without a better one as were asked for."""
        return self._patience is not None and self._since >= self._patience

    def after_step(self, number: int) -> None:
        """Validate, if it is due after this step, counted from 1; always after the last one."""
        if number % self._every and number != self._steps:
            return
        accuracy, count = self._evaluator.accuracy(0)
        self._model.train()
        self._since += 1
        if accuracy > self._best:
            self._best, self._best_step, self._since = accuracy, number, 0
            self._weights = snapshot(self._model.trainable())
        _log.info(
            "%s step %d: %.2f of %d validation images; best %.2f at step %d",
            self._task.name,
            number,
            accuracy,
            count,
            self._best,
            self._best_step,
        )

    @torch.no_grad()
    def keep_best(self) -> None:
        """Give the model the weights of the best step."""
        for name, weight in self._model.trainable().items():
            weight.copy_(self._weights[name])
        _log.info(
            "task %s keeps step %d, with %.2f of its validation images",
            self._task.name,
            self._best_step,
            self._best,
        )

    def state(self) -> dict[str, Any]:
        """What changes from step to step."""
        return {
            "best": self._best,
            "step": self._best_step,
            "since": self._since,
            "weights": self._weights,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what `state` returned."""
        self._best, self._best_step = state["best"], state["step"]
        self._since = state["since"]
        self._weights = snapshot(self._model.trainable()) if state["weights"] else {}
        for name, value in self._weights.items():
            set_whole(value, state["weights"][name])


def validates(config: RunConfig, task: Task) -> bool:
    """Whether a task is validated while it is learned."""
    return task.val is not None and config.val_every != 0


def validations(config: RunConfig, task: Task, steps: int) -> int:
    """How often a task is validated, if it is not ended early."""
    return math.ceil(steps / _every(config, steps)) if steps and validates(config, task) else 0


def _every(config: RunConfig, steps: int) -> int:
    return config.val_every or math.ceil(steps / _TIMES)


def with_validation(config: RunConfig, method: Method, tasks: Sequence[Task]) -> list[Task]:
    """The tasks, with validation images taken from their training images as the options say.

    A task that has some keeps its own, and so do tasks of captions, which have none.

    Raises:
        InputError: options about validation without images for it or where it is turned off, or a
            method whose weights at the end of a task are a mean over its steps.
    """
    fraction, off = config.val_fraction, config.val_every == 0
    for name, given in (("--val-fraction", fraction), ("--early-stopping", config.early_stopping)):
        # A run that goes on has both from the earlier run, and can only turn validation off.
        if off and given is not None and config.continue_ is None:
            raise InputError(
                f"{name}: got {given:g}, but --val-every 0 turns validation off; leave one of the "
                "two out"
            )
    if fraction is not None and not off:
        tasks = [
            held_back(task, fraction)
            if task.classes and task.val is None and len(task.train)
            else task
            for task in tasks
        ]
    having = [task.name for task in tasks if validates(config, task)]
    asked = {"--early-stopping": config.early_stopping, "--val-every": config.val_every}
    for name, value in asked.items():
        if value and not having and not off:
            raise InputError(
                f"{name}: got {value}, but no task has validation images; pass --val-fraction "
                "0.1, or put them into val/ beside train/ and test/"
            )
    if having and method.trains and method.averages:
        without = "--val-every 0" if fraction is None or config.continue_ else "no --val-fraction"
        raise InputError(
            f"--val-every: the best step on the validation images of {having[0]} is kept, but "
            f"method {method.name} ends a task with the mean of the weights of many steps; pass "
            f"--we-every 0, or {without} to do without validation"
        )
    return list(tasks)
