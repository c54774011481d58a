"""The sequence runner: tasks in order, evaluation before the first and after each."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mulki import methods, models
from mulki.data import Task, load_sequence
from mulki.data.loader import batches
from mulki.data.subset import limited
from mulki.data.transforms import train_transform
from mulki.engine.checkpoints import publish, save_weights
from mulki.engine.config import RunConfig, Settings
from mulki.engine.learn import StepReport, learn_task, steps_of
from mulki.engine.precision import Precision
from mulki.engine.progress import RunProgress, describe
from mulki.errors import InputError
from mulki.evaluate import Evaluator
from mulki.methods import PREVIOUS, ZERO_SHOT, Method
from mulki.metrics import ZERO_SHOT as ZERO_SHOT_ROW
from mulki.models import VisionLanguageModel
from mulki.results import RunFolder, check_free

_log = logging.getLogger(__name__)


def run(
    settings: Settings, console: Console | None = None, tasks: Sequence[Task] | None = None
) -> RunFolder:
    """Learn a sequence of tasks and write its run folder.

    Everything that can be checked is checked before the folder is made. The global generators of
    Python, NumPy and torch are seeded. An interrupt, or an error,
    leaves the results so far in the folder, marked as interrupted.

    Args:
        settings: from `mulki.engine.config.resolve`.
        console: where progress is drawn; none by default.
        tasks: learned instead of those that the settings name.

    Returns:
        The finished run folder.

    Raises:
        InputError: bad tasks, model, device or options, or a folder that is taken.
    """
    config = settings.run
    console = console or Console(quiet=True)
    device = _device(config.device)
    tasks = load_tasks(config) if tasks is None else tasks
    method = methods.get(config.method)(settings.method)
    # Loading a model can take minutes, so what would refuse its folder is looked at first.
    check_free(config.logs, config.name)
    _seed_everything(config.seed)
    model = models.load(config.model, config.pretrained, device=device)
    model.lock(text=config.lock_text, image=config.lock_image)
    if method.trains and not model.trainable():
        raise InputError(
            "--lock-image, --lock-text: nothing is left to train; leave one of them out"
        )
    precision = Precision(config.precision, device)
    resolved = settings.to_dict() | {"precision": precision.name, "device": str(device)}
    folder = RunFolder.create(
        config.logs,
        config.name,
        method=config.method,
        order=config.order,
        seed=config.seed,
        columns=tuple(task.name for task in tasks),
        config=resolved,
        hashes=_hashes(model, tasks),
    )
    steps = sum(steps_of(config, len(task.train)) for task in tasks) if method.trains else 0
    with folder, RunProgress(console, steps) as progress:
        for task in tasks:
            if task.skipped:
                _log.warning("task %s: %d unreadable images left out", task.name, len(task.skipped))
        _Sequence(folder, model, method, tasks, config, precision, progress).learn()
    return folder


def load_tasks(config: RunConfig) -> list[Task]:
    """The tasks of a configuration, in their order.

    Raises:
        InputError: see `mulki.data.load_sequence`.
    """
    tasks = load_sequence(config.tasks, config.order, skip_bad_images=config.skip_bad_images)
    if config.limit_images is not None:
        tasks = [limited(task, config.limit_images) for task in tasks]
    return tasks


class _Sequence:
    """The state of one run while it goes on."""

    def __init__(
        self,
        folder: RunFolder,
        model: VisionLanguageModel,
        method: Method,
        tasks: Sequence[Task],
        config: RunConfig,
        precision: Precision,
        progress: RunProgress,
    ):
        self.folder = folder
        self.model = model
        self.method = method
        self.tasks = tasks
        self.config = config
        self.precision = precision
        self.progress = progress
        self.steps = 0
        self.evaluator = Evaluator(model, tasks, [self._test_batches(task) for task in tasks])
        mean, std = _normalisation(model)
        self.transform = train_transform(
            model.preprocess, config.augment, model.image_size, mean, std
        )

    def learn(self) -> None:
        accuracies = self._evaluate(ZERO_SHOT_ROW)
        needs = self.method.needs
        original = self.model.frozen_copy() if needs.teachers or needs.prototypes else None
        for index, task in enumerate(self.tasks):
            if self.method.trains:
                self.progress.says(f"{index + 1}/{len(self.tasks)} {task.name}")
                self._learn_task(index, task, original)
                accuracies = self._evaluate(task.name)
            else:
                self._record(task.name, accuracies)
            if self.method.trains and self.config.save_checkpoints:
                path = self.folder.checkpoint_path(index + 1, task.name)
                save_weights(self.model, path)
                publish(self.model, path, self.folder.latest)

    def _learn_task(self, index: int, task: Task, original: VisionLanguageModel | None) -> None:
        frozen = {}
        if original is not None:
            previous = original if index == 0 else self.model.frozen_copy()
            frozen = {ZERO_SHOT: original, PREVIOUS: previous}
        before = self.steps

        def listen(report: StepReport) -> None:
            self.progress.step(report)
            if report.step % self.config.log_every_n_steps == 0 or report.step == 1:
                _log.info(
                    "%s step %d: %s, lr %.2e, %.0f img/s",
                    task.name,
                    report.step,
                    describe(report),
                    report.lr,
                    report.images / report.seconds,
                )
                for name, value in report.losses.items():
                    self.folder.scalar(f"train/{name}", value, before + report.step)

        self.steps += learn_task(
            self.model,
            self.method,
            task,
            frozen,
            self.config,
            index=index,
            transform=self.transform,
            precision=self.precision,
            listen=listen,
        )

    def _evaluate(self, after_task: str) -> dict[str, tuple[float, int, float]]:
        results = {}
        for number, task in enumerate(self.tasks):
            self.progress.says(f"test {task.name}")
            started = time.perf_counter()
            accuracy, seen = self.evaluator.accuracy(number)
            results[task.name] = (accuracy, seen, time.perf_counter() - started)
        self._record(after_task, results)
        return results

    def _record(self, after_task: str, results: Mapping[str, tuple[float, int, float]]) -> None:
        for name, (accuracy, seen, seconds) in results.items():
            self.folder.record(
                after_task=after_task,
                eval_dataset=name,
                value=accuracy,
                n=seen,
                seconds=seconds,
                step=self.steps,
            )
        row = {name: accuracy for name, (accuracy, _, _) in results.items()}
        self.folder.add_row(after_task, row)
        _log.info("after %s: %s", after_task, ", ".join(f"{k} {v:.1f}" for k, v in row.items()))

    def _test_batches(self, task: Task) -> Iterable[Sequence[Tensor]]:
        return batches(
            task.test,
            self.model.preprocess,
            self.config.batch_size_eval,
            shuffle=False,
            seed=self.config.seed,
            workers=self.config.workers,
            cached=True,
            cache_mb=256,
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"--device: {name} cannot be used ({reason}); try auto or cpu") from None
    return device


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _normalisation(model: VisionLanguageModel) -> tuple[Sequence[float], Sequence[float]]:
    visual: Any = model.clip.visual
    return visual.image_mean, visual.image_std


def _hashes(model: VisionLanguageModel, tasks: Sequence[Task]) -> dict[str, object]:
    weights = hashlib.sha256()
    for name, value in sorted(model.checkpoint().items()):
        weights.update(name.encode())
        weights.update(value.numpy().tobytes())
    return {"weights": weights.hexdigest(), "tasks": {t.name: t.fingerprint() for t in tasks}}
