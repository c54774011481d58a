"""The sequence runner: tasks in order, evaluation before the first and after each."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from mulki import methods, models
from mulki.data import Task, load_sequence
from mulki.data.loader import batch_sizes, batches
from mulki.data.subset import limited
from mulki.data.transforms import train_transform
from mulki.engine import distributed, sharding
from mulki.engine.checkpoints import publish, save_weights
from mulki.engine.config import RunConfig, Settings
from mulki.engine.distributed import World
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
) -> RunFolder | None:
    """Learn a sequence of tasks and write its run folder.

    Everything that can be checked is checked before the folder is made. The global generators of
    Python, NumPy and torch are seeded. An interrupt, or an error,
    leaves the results so far in the folder, marked as interrupted.

    Started by torchrun, the processes share the work: each encodes `batch_size` images of a batch,
    and its part of the class texts, of the teachers' work and of the test images. The results are
    those of one process with the same number of images in a batch, to rounding.

    Args:
        settings: from `mulki.engine.config.resolve`.
        console: where progress is drawn; none by default.
        tasks: learned instead of those that the settings name.

    Returns:
        The finished run folder; None in all processes but the first, which write nothing.

    Raises:
        InputError: bad tasks, model, device or options, or a folder that is taken.
        ProcessLost: another process of the run has ended.
    """
    config = settings.run
    method = methods.get(config.method)(settings.method)
    precision = Precision(config.precision, _device(config.device))
    _check_together(config, precision)
    with distributed.join(precision.device) as world:
        return _run(settings, tasks, method, precision, world, console or Console(quiet=True))


def _run(
    settings: Settings,
    tasks: Sequence[Task] | None,
    method: Method,
    precision: Precision,
    world: World,
    console: Console,
) -> RunFolder | None:
    config = settings.run
    try:
        tasks, model = _prepare(config, tasks, method, precision, world)
        facts = _facts(settings, tasks, model) if world.size > 1 else {}
        problem = None
    except InputError as error:
        facts, problem = {}, error
    world.agree(precision.device, problem, **facts)
    assert tasks is not None
    # Not before: the weights are those of one seed, what is drawn while learning is each one's own.
    if world.rank:
        _seed_everything(config.seed + world.rank)
    folder = None
    if world.main:
        # Every process has a device of its own: what they have in common is its kind.
        device = precision.device
        shown = device.type if world.size > 1 else str(device)
        resolved = settings.to_dict() | {"precision": precision.name, "device": shown}
        folder = RunFolder.create(
            config.logs,
            config.name,
            method=config.method,
            order=config.order,
            seed=config.seed,
            columns=tuple(task.name for task in tasks),
            config=resolved,
            hashes={
                "weights": _weights_hash(model),
                "tasks": {t.name: t.fingerprint() for t in tasks},
            },
        )
    precision.convert(model)
    steps = sum(steps_of(config, len(t.train), world.size) for t in tasks) if method.trains else 0
    quiet = console if world.main else Console(quiet=True)
    with folder or contextlib.nullcontext(), RunProgress(quiet, steps) as progress:
        if world.size > 1:
            _log.info(
                "%d processes, %d images in a batch", world.size, world.size * config.batch_size
            )
        for task in tasks:
            if task.skipped:
                _log.warning("task %s: %d unreadable images left out", task.name, len(task.skipped))
        _Sequence(folder, model, method, tasks, config, precision, progress, world).learn()
    return folder


def _prepare(
    config: RunConfig,
    tasks: Sequence[Task] | None,
    method: Method,
    precision: Precision,
    world: World,
) -> tuple[Sequence[Task], VisionLanguageModel]:
    # All that can be refused. Loading a model can take minutes, so it comes last.
    if world.main:
        check_free(config.logs, config.name)
    tasks = load_tasks(config) if tasks is None else tasks
    _seed_everything(config.seed)
    # What is to be sharded need not fit on one device.
    device = "cpu" if config.fsdp and world.size > 1 else precision.device
    model = models.load(config.model, config.pretrained, device=device)
    model.lock(text=config.lock_text, image=config.lock_image)
    if method.trains and not model.trainable():
        raise InputError(
            "--lock-image, --lock-text: nothing is left to train; leave one of them out"
        )
    if config.grad_checkpointing:
        model.checkpoint_activations()
    return tasks, model


# What processes on different machines may well have of their own.
_OWN = ("tasks", "model", "pretrained", "workers", "device", "logs", "name", "log_every_n_steps")


def _facts(
    settings: Settings, tasks: Sequence[Task], model: VisionLanguageModel
) -> dict[str, object]:
    # What has to be the same in all processes, short enough for a message.
    options = {k: v for k, v in settings.to_dict().items() if k not in _OWN}
    seen = [t.fingerprint() for t in tasks]
    return {
        "torch": torch.__version__,
        "options (hash)": _hash(options),
        "tasks": f"{len(tasks)} tasks with {sum(len(t.train) for t in tasks)} training and "
        f"{sum(len(t.test) for t in tasks)} test images, hash {_hash(seen)}",
        "start weights (hash)": _weights_hash(model)[:12],
    }


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _check_together(config: RunConfig, precision: Precision) -> None:
    # What one option alone cannot tell is wrong.
    if config.fsdp and not distributed.launched():
        raise InputError(
            "--fsdp: this is the only process, nothing can be sharded; start several with torchrun "
            "--nproc-per-node N -m mulki run ..., or leave --fsdp out"
        )
    if config.fsdp and precision.scaler.is_enabled():
        raise InputError(
            "--fsdp: gradient scaling does not work on sharded gradients; pass --precision amp_bf16"
        )


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
        folder: RunFolder | None,
        model: VisionLanguageModel,
        method: Method,
        tasks: Sequence[Task],
        config: RunConfig,
        precision: Precision,
        progress: RunProgress,
        world: World,
    ):
        self.folder = folder
        self.model = model
        self.method = method
        self.tasks = tasks
        self.config = config
        self.precision = precision
        self.progress = progress
        self.world = world
        self.steps = 0
        self.evaluator = Evaluator(
            model,
            tasks,
            [_Share(self._test_batches(task), world) for task in tasks],
            prepare=partial(distributed.text_inputs, world=world),
            encode=partial(distributed.text_features, world=world),
            total=self._total,
        )
        mean, std = _normalisation(model)
        self.transform = train_transform(
            model.preprocess, config.augment, model.image_size, mean, std
        )

    def learn(self) -> None:
        frozen = self._frozen_models()
        if self.config.fsdp:
            for model in {id(m): m for m in (self.model, *frozen.values())}.values():
                sharding.shard(model, self.precision.device)
        if self.config.torchcompile:
            for model in {id(m): m for m in (self.model, *frozen.values())}.values():
                model.compile()
        accuracies = self._evaluate(ZERO_SHOT_ROW)
        for index, task in enumerate(self.tasks):
            if self.method.trains:
                self.progress.says(f"{index + 1}/{len(self.tasks)} {task.name}")
                of_task = frozen
                if index == 0 and ZERO_SHOT in frozen:
                    of_task = dict.fromkeys(frozen, frozen[ZERO_SHOT])
                elif index > 0 and PREVIOUS in frozen:
                    frozen[PREVIOUS].copy_from(self.model)
                self._learn_task(index, task, of_task)
                accuracies = self._evaluate(task.name)
            else:
                self._record(task.name, accuracies)
            if self.method.trains and self.config.save_checkpoints:
                self._save(index + 1, task)

    def _frozen_models(self) -> dict[str, VisionLanguageModel]:
        # Made once, and refilled task after task: a sharded model cannot be copied.
        needs, several = self.method.needs, len(self.tasks) > 1
        frozen = {}
        if ZERO_SHOT in needs.teachers or needs.prototypes:
            frozen[ZERO_SHOT] = self.model.frozen_copy()
        if PREVIOUS in needs.teachers:
            # At the first task the two are one.
            shared = None if several else frozen.get(ZERO_SHOT)
            frozen[PREVIOUS] = shared or self.model.frozen_copy()
        return frozen

    def _save(self, number: int, task: Task) -> None:
        # All processes take part where weights are sharded; one writes.
        state, whole = self.model.checkpoint(), None
        if self.model.packaged:
            whole = self.model.checkpoint(whole=True)
        if self.folder is not None:
            path = self.folder.checkpoint_path(number, task.name)
            save_weights(self.model, path, state)
            publish(self.model, path, self.folder.latest, whole)

    def _learn_task(
        self, index: int, task: Task, frozen: Mapping[str, VisionLanguageModel]
    ) -> None:
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
                    if self.folder is not None:
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
            world=self.world,
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
        if self.folder is None:
            return
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

    def _total(self, correct: int, seen: int) -> tuple[int, int]:
        correct, seen = self.world.total(correct, seen, device=self.precision.device)
        return correct, seen

    def _test_batches(self, task: Task) -> DataLoader[tuple[Tensor, int, int]]:
        return batches(
            task.test,
            self.model.preprocess,
            self.config.batch_size_eval * self.world.size,
            shuffle=False,
            seed=self.config.seed,
            workers=self.config.workers,
            cached=True,
            cache_mb=256,
            pin_memory=self.precision.device.type == "cuda",
            share=self.world.rows,
        )


class _Share:
    """This process's share of test batches; what it repeats to fill up has the target -1."""

    def __init__(self, loader: DataLoader[tuple[Tensor, int, int]], world: World):
        self._loader = loader
        self._world = world

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        for (images, target, _), count in zip(self._loader, batch_sizes(self._loader), strict=True):
            target[self._world.own(count) :] = -1
            yield images, target


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Its own one is tried alone: a context on the first GPU for each process would fill that.
        device = distributed.device_of_process(torch.device(name))
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


def _weights_hash(model: VisionLanguageModel) -> str:
    weights = hashlib.sha256()
    for name, value in sorted(model.checkpoint().items()):
        weights.update(name.encode())
        weights.update(value.numpy().tobytes())
    return weights.hexdigest()
