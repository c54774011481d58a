"""Where the numbers of a step go: the display, ``out.log``, ``history.jsonl`` and trackers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from mulki.data import Task
from mulki.runs.history import BINS, StepRecord, add_step
from mulki.train.config.tasks import needs_of
from mulki.train.display.outline import images_of_teachers
from mulki.train.display.progress import STEPS, TEACHERS, RunProgress, describe
from mulki.train.learning.inputs import StepReport
from mulki.train.learning.memory import peak_memory
from mulki.train.start.setup import Setup

_log = logging.getLogger(__name__)

# Of a curve of a short task, where no number of steps between them is given.
_POINTS = 20


class Reporter:
    """Tells of the steps of a run.

    What is more than the losses is read from the device and written at every `log_every_n_steps`,
    the first and the last step of a task alone, and by the first process alone.

    Args:
        setup: of the run.
        progress: the display.
    """

    def __init__(self, setup: Setup, progress: RunProgress):
        self._setup = setup
        self._progress = progress
        self._parts: dict[str, float] = {}
        self._steps_since = 0

    def start_task(self, index: int, task: Task, steps: int, before: int) -> None:
        """Begin a task, from 0, of so many steps, with so many steps of the run before it."""
        self._index, self._task, self._steps, self._before = index, task, steps, before
        self._started: float | None = time.perf_counter()
        self._forget()
        self._progress.task(index + 1, task.name)
        if images := images_of_teachers(self._setup, task):
            self._progress.stage("teachers", TEACHERS, images)
        else:
            self._progress.stage("", STEPS, steps)

    def _forget(self) -> None:
        self._parts, self._steps_since = {}, 0

    def step(self, report: StepReport) -> None:
        """Take the numbers of a step."""
        prepared = None
        if self._started is not None:
            prepared = time.perf_counter() - self._started - report.seconds
            self._started = None
            self._progress.stage("", STEPS, self._steps, report.step - 1)
        self._steps_since += 1
        for name, seconds in (*report.parts.items(), ("rest", _rest(report))):
            self._parts[name] = self._parts.get(name, 0.0) + seconds
        every = self._setup.config.log_every_n_steps or max(1, min(10, self._steps // _POINTS))
        logged = report.step in (1, self._steps) or report.step % every == 0
        if logged and self._setup.folder is not None:
            self._write(report, prepared)
        self._progress.step(report)

    def _write(self, report: StepReport, prepared: float | None) -> None:
        setup, folder = self._setup, self._setup.folder
        assert folder is not None
        rate = report.images / report.seconds
        line = "%s step %d: %s, lr %.2e, %.0f img/s"
        _log.info(line, self._task.name, report.step, describe(report), report.lr, rate)
        seconds = {name: value / self._steps_since for name, value in self._parts.items()}
        self._forget()
        watched = setup.method.watched()
        weights = watched.get("teacher_weights")
        names = needs_of(setup.method, self._task).teachers
        means = (
            {} if weights is None else dict(zip(names, weights.mean(dim=0).tolist(), strict=True))
        )
        drift = watched.get("prototype_drift")
        memory = peak_memory(setup.precision.device)
        record = StepRecord(
            task=self._task.name,
            index=self._index,
            step=report.step,
            steps=self._steps,
            total=self._before + report.step,
            losses=dict(report.losses),
            lr=report.lr,
            images_per_second=rate,
            seconds=seconds,
            memory_mib=None if memory is None else memory / 2**20,
            teacher_weights={} if weights is None else _histograms(names, weights),
            prototype_drift={}
            if drift is None
            else {"mean": drift.mean().item(), "max": drift.max().item()},
            prepared=prepared,
        )
        add_step(folder.path, record)
        self._track(record, means, report.images)
        self._progress.watch(memory, means)

    def _track(self, record: StepRecord, weights: Mapping[str, float], images: int) -> None:
        # The names are those of open_clip, where it has one.
        scalars = {f"train/{name}": value for name, value in record.losses.items()}
        scalars |= {
            "train/loss": sum(record.losses.values()),
            "train/lr": record.lr,
            "train/samples_per_second": record.images_per_second,
            "train/samples_per_second_per_gpu": record.images_per_second / self._setup.world.size,
            "train/data_time": record.seconds["loading"],
            "train/batch_time": sum(record.seconds.values()),
        }
        scalars |= {f"teachers/{name}": value for name, value in weights.items()}
        scalars |= {f"prototype_drift/{k}": value for k, value in record.prototype_drift.items()}
        if record.memory_mib is not None:
            scalars["memory_mib"] = record.memory_mib
        assert self._setup.folder is not None
        self._setup.folder.scalars(scalars, record.total)


def _rest(report: StepReport) -> float:
    # Saves, and this reporting.
    return max(report.seconds - sum(report.parts.values()), 0.0)


def _histograms(names: tuple[str, ...], weights: Tensor) -> dict[str, list[int]]:
    # NaN, and what rounding leaves outside, counts at the ends.
    bins = (weights * BINS).nan_to_num().long().clamp(0, BINS - 1).T.cpu()
    return {
        name: torch.bincount(of, minlength=BINS).tolist()
        for name, of in zip(names, bins, strict=True)
    }
