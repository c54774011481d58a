"""Our loop: `mulki.train.learning.learn.learn_task` as it is, watched from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from benchmarks.step.job import Job, WithCaptions
from benchmarks.step.stopwatch import Stopwatch
from mulki.clip.models import VisionLanguageModel
from mulki.clip.texts import text_features
from mulki.methods import PREVIOUS, ZERO_SHOT
from mulki.train.learning.inputs import Listeners, StepReport, TaskInputs, Training
from mulki.train.learning.learn import learn_task
from mulki.train.learning.task_teachers import TaskTeachers


def learn(job: Job, watch: Stopwatch, listen: Callable[[StepReport, float], None]) -> None:
    """Learn the task as the second of a sequence.

    Args:
        watch: started when this begins and whenever `listen` ends, so that the first step holds
            what is done once a task.
        listen: called after every step with its seconds.
    """
    watch.start()
    model, precision = job.student(), job.precision()
    original, previous = job.teachers
    if job.config.torchcompile:
        for each in (model, original, previous):
            each.compile()
    captions = torch.empty(0, device=job.device)
    if job.captions:
        with torch.no_grad(), precision.autocast():
            captions = text_features(original, original.text_inputs(job.captions))
    method = WithCaptions(job.options, captions, original.logit_scale)

    def stepped(report: StepReport) -> None:
        listen(report, watch.stop())
        watch.start()

    with _watched(model, method, watch):
        training = Training(
            config=job.config,
            method=method,
            model=model,
            transform=job.transform,
            precision=precision,
        )
        frozen = {ZERO_SHOT: original, PREVIOUS: previous}
        learn_task(training, TaskInputs(1, job.task, frozen), Listeners(stepped))


@contextlib.contextmanager
def _watched(model: VisionLanguageModel, method: WithCaptions, watch: Stopwatch) -> Iterator[None]:
    features, losses = TaskTeachers.features, method.losses

    def asked(teachers: TaskTeachers, *args: Any) -> Any:
        watch.lap("data")
        answers = features(teachers, *args)
        watch.lap("teachers")
        return answers

    def encoder(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def encoded(inputs: Tensor) -> Tensor:
            features = encode(inputs)
            watch.lap("forward")
            return watch.end_loss_at(features)

        return encoded

    def computed(*args: Any) -> Any:
        terms = losses(*args)
        watch.lap("loss")
        return terms

    with (
        mock.patch.object(TaskTeachers, "features", asked),
        mock.patch.object(model, "encode_images", encoder(model.encode_images)),
        mock.patch.object(model, "encode_texts", encoder(model.encode_texts)),
        mock.patch.object(method, "losses", computed),
        watched_optimizer(watch),
    ):
        yield


@contextlib.contextmanager
def watched_optimizer(watch: Stopwatch) -> Iterator[None]:
    """Count the steps of optimisers as such, and what went before as the backward pass."""
    before = register_optimizer_step_pre_hook(lambda *_: watch.lap("backward"))
    after = register_optimizer_step_post_hook(lambda *_: watch.lap("optimiser"))
    try:
        yield
    finally:
        before.remove()
        after.remove()
