"""The tasks in order: evaluation before the first and after each, and the saving of weights."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mulki.clip.evaluation import shared_classes
from mulki.clip.head import ClassStatistics, read_statistics, write_statistics
from mulki.clip.tensor_files import load_tensors, save_tensors
from mulki.console import Console
from mulki.data import Task
from mulki.distributed import launch
from mulki.distributed.torchrun import is_first
from mulki.errors import InputError, ProcessLost, Stopped, counted
from mulki.methods import Method
from mulki.report import write_report
from mulki.runs.answers import read_answers
from mulki.runs.catalog import write_tasks
from mulki.runs.environment import changes_since
from mulki.runs.folder import RunFolder
from mulki.runs.metrics import ZERO_SHOT as ZERO_SHOT_ROW
from mulki.runs.reading import read_json
from mulki.train.config.run_config import Settings
from mulki.train.config.tasks import needs_of
from mulki.train.display.outline import amounts, plan, prepared_images
from mulki.train.display.progress import TEACHERS, RunProgress, checking
from mulki.train.display.reporter import Reporter
from mulki.train.learning.anchor_texts import anchor_texts
from mulki.train.learning.inputs import Listeners
from mulki.train.learning.learn import steps_of
from mulki.train.learning.training_set import class_moments, sample, sample_features
from mulki.train.rows import Row, Rows
from mulki.train.saving.checkpoints import (
    adapters_of,
    kept_of,
    publish,
    save_weights,
    statistics_of,
)
from mulki.train.saving.recovery import TOO_FAST, Saves, check_finite, finish_again, is_complete
from mulki.train.saving.signals import Signals
from mulki.train.start.continuation import Continuation, set_weights
from mulki.train.start.setup import Setup, prepared
from mulki.train.task_learner import TaskLearner

_log = logging.getLogger(__name__)


def run(
    settings: Settings,
    console: Console | None = None,
    tasks: Sequence[Task] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> RunFolder | None:
    """Learn a sequence of tasks and write its run folder.

    Everything that can be checked is checked before the folder is made. The global generators of
    Python, NumPy and torch are seeded. A signal, or an error, leaves the results so far in the
    folder, marked as interrupted, and a save from which `resume` goes on.

    Started by torchrun, the processes divide the work: each encodes `batch_size` images of a batch,
    and its part of the class texts, of the teachers' work and of the test images. The results are
    those of one process with the same number of images in a batch, to rounding.

    Args:
        settings: from `mulki.train.config.run_config.resolve`.
        console: where progress is drawn; none by default.
        tasks: learned instead of those that the settings name.
        resume: the folder of a run with these settings, which has ended too early. It goes on from
            its last save and ends as if it had not been stopped. Of one that is complete only the
            reports are written again.

    Returns:
        The finished run folder; None in all processes but the first, which write nothing.

    Raises:
        InputError: bad tasks, model, device or options, or a folder that is taken.
        ProcessLost: another process of the run has ended.
        Stopped: SIGINT, SIGTERM or SIGHUP came.
    """
    if resume is not None and _all_find_complete(Path(resume)):
        if not (dist.get_rank() == 0 if dist.is_initialized() else is_first()):
            return None
        complete = finish_again(Path(resume))
        _write_report(complete)
        return complete
    console = console or Console(quiet=True)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        with checking(console) as checked:
            setup = stack.enter_context(
                prepared(settings, tasks, resume, hold=signals.hold, checked=checked)
            )
        if not setup.world.main:
            console = Console(quiet=True)
        bar = RunProgress(console, amounts(setup), len(setup.tasks))
        folder = setup.folder
        try:
            try:
                with folder or contextlib.nullcontext(), bar, setup.world.watched():
                    _Sequence(setup, bar, signals).learn()
            finally:
                # A second signal ends this, too.
                if folder is not None and folder.rows:
                    _write_report(folder)
        except (Stopped, ProcessLost) as stopped:
            if folder is not None:
                stopped.results = str(folder.path) if folder.rows else None
                stopped.resume = str(folder.path)
            raise
    return folder


def _all_find_complete(folder: Path) -> bool:
    # The first process decides for all: another one may see the folder late, or not at all.
    complete = is_complete(folder)
    if launch.launched() and not dist.is_initialized():
        complete = bool(launch.meeting().told_by_first("complete", complete))
    return complete


def _write_report(folder: RunFolder) -> None:
    # The results are written already, so a report that fails does not fail the run.
    try:
        write_report(folder.path)
    except Exception as error:
        _log.warning(
            "no report in %s (%s: %s); the results are written",
            folder.path,
            type(error).__name__,
            error,
        )


class _Sequence:
    """The state of a run between its tasks."""

    def __init__(self, setup: Setup, progress: RunProgress, signals: Signals):
        self.setup = setup
        self.progress = progress
        self.signals = signals
        self.reporter = Reporter(setup, progress)
        self.learned = 0
        self.steps = 0
        self.statistics = ClassStatistics()
        # Of the task that is being learned, by the model before it.
        self.sample: Tensor | None = None
        self.saves = Saves(
            None if setup.folder is None else setup.folder.path,
            signals,
            setup.world,
            setup.precision.device,
            setup.config.save_every,
            # The weights, two moments of the optimiser and about as much of the method.
            size=4 * sum(p.nbytes for p in setup.model.trainable().values()),
            used=setup.method.trains,
        )

    def learn(self) -> None:
        setup = self.setup
        method, tasks = setup.method, setup.tasks
        self._log_start()
        learner = TaskLearner(setup)
        self.rows = Rows(setup, self.progress, learner.frozen)
        planned = self.rows.planned
        self.saves.of_run(lambda in_task: self._done() | learner.state(in_task))
        in_task = None
        if setup.saved is not None:
            self.learned, self.steps = setup.saved["learned"], setup.saved["steps"]
            self.statistics = ClassStatistics.of_state(setup.saved["statistics"]["kept"])
            self.sample = setup.saved["statistics"]["sample"]
            in_task = learner.restore(setup.saved)
            done = self.steps + (in_task["steps"] if in_task else 0)
            self._skip(done)
            steps = counted(done, "step")
            self._tell(f"goes on after {counted(self.learned, 'task')} and {steps}")
            self._tell_changes()
        self._check_answers()
        if not method.trains:
            # A model that does not learn is evaluated once, for all rows.
            heads = [self.rows.head(self.statistics)]
            for task in tasks:
                self._keep_statistics(task)
                heads.append(self.rows.head(self.statistics))
            learned = [learned for _, learned in planned]
            found = self.rows.of_heads(learned, [heads[count] for count in learned])
            for number in range(setup.rows, len(planned)):
                self.rows.record(planned[number][0], found[number], self.steps)
            return
        if setup.goes_on is not None and setup.saved is None:
            self._take_over(setup.goes_on)
        else:
            if in_task is None and self.learned > setup.earlier:
                self._end_task(tasks[self.learned - 1])  # as far as it was not done
            if self.learned in [learned for _, learned in planned[setup.rows :]]:
                self._finish(self.learned)
        for index in range(self.learned, len(tasks)):
            self._learn_task(index, tasks[index], learner, in_task)
            in_task = None
            self.learned = index + 1
            self._end_task(tasks[index])
            self._finish(index + 1)

    def _tell(self, line: str) -> None:
        _log.info("%s", line)
        self.progress.say(line)

    def _tell_changes(self) -> None:
        folder = self.setup.folder
        if folder is None:
            return
        if changes := changes_since(read_json(folder.path / "env.json")):
            _log.warning("results may be rounded otherwise from here on (%s)", "; ".join(changes))

    def _check_answers(self) -> None:
        # A run that goes on needs none of them, so damage is no reason to end it.
        folder = self.setup.folder
        if folder is None or not self.setup.rows:
            return
        try:
            read_answers(folder.path)
        except InputError as error:
            _log.warning("%s; the run goes on, and its page lacks all answers", error)

    def _take_over(self, goes_on: Continuation) -> None:
        # What the models of earlier runs say now, and the weights to go on with.
        model, earlier = self.setup.model, self.setup.earlier
        self.setup.method.goes_on(model.trainable())
        for number, (name, learned) in enumerate(self.rows.planned):
            if learned > earlier:
                break
            if learned:
                self._take_weights(goes_on.weights[learned])
            if number >= self.setup.rows:
                row = self.rows.of_model(learned, self.statistics)
                self.rows.record(name, row, self.steps)
        self._take_weights(goes_on.weights[earlier])
        self._take_kept(kept_of(goes_on.weights[earlier]))
        self.learned = earlier

    def _take_kept(self, file: Path) -> None:
        if type(self.setup.method).take_kept is Method.take_kept:
            return
        goes_on, name = self.setup.goes_on, self.setup.config.method
        # Another method's file has another meaning.
        before = name if goes_on is None else goes_on.said.recipe["method"]
        if before == name and file.is_file():
            self.setup.method.take_kept(load_tensors(file)[0])
            return
        why = f"there is no {file}" if before == name else f"method {before} learned them"
        _log.warning("method %s does not hold on to the earlier tasks, for %s", name, why)

    def _take_weights(self, file: Path) -> None:
        # Of an earlier run, with the class statistics beside them.
        set_weights(self.setup.model, file)
        statistics = statistics_of(file)
        if not self.setup.config.head:
            return
        if statistics.is_file():
            self.statistics = read_statistics(statistics)
        elif any(task.classes for task in self.setup.tasks[: self.setup.earlier]):
            _log.warning(
                "there is no %s, so texts alone answer for the earlier tasks, and no results with "
                "head are shown",
                statistics,
            )

    def _skip(self, steps: int) -> None:
        # What an earlier process did.
        tasks = self.setup.tasks
        before = prepared_images(self.setup, tasks[self.setup.earlier : self.learned])
        tested = self.setup.rows * sum(len(task.test) for task in tasks)
        self.progress.skip(steps=steps, prepared=before, tested=tested)

    def _check_weights(self, where: str) -> None:
        problem = None
        try:
            check_finite(self.setup.model.trainable(), where, TOO_FAST)
        except InputError as error:
            problem = error
        # Each process may have other parts of them.
        self.setup.world.agree(self.setup.precision.device, problem)

    def _finish(self, learned: int) -> None:
        # The weights after so many tasks: their checkpoint is written when their features are
        # known to be sound, and before the row that speaks of them.
        row = self.rows.of_model(learned, self.statistics)
        if learned and self.setup.config.save_checkpoints:
            self._save(learned, row)
        name = self.setup.tasks[learned - 1].name if learned else ZERO_SHOT_ROW
        self.rows.record(name, row, self.steps)

    def _log_start(self) -> None:
        config, world, folder = self.setup.config, self.setup.world, self.setup.folder
        for line in plan(self.setup):
            self._tell(line)
        if folder is not None:
            write_tasks(folder.path, self.setup.tasks)
        if world.size > 1:
            images = world.size * config.batch_size
            _log.info("%d processes, %d images in a batch", world.size, images)
        new = self.setup.tasks[self.setup.earlier :]
        if self.setup.method.trains and config.warmup:
            steps = min(steps_of(config, len(task.train), world.size) for task in new)
            if config.warmup >= steps:
                _log.warning(
                    "--warmup %d: a task of %d steps hardly reaches --lr", config.warmup, steps
                )
        for task in new:
            if task.skipped:
                _log.warning(
                    "task %s: unreadable images left out: %d", task.name, len(task.skipped)
                )
        shared = shared_classes(self.setup.tasks) if config.label_space != "task" else {}
        if shared:
            each = [f"{name} ({', '.join(owners)})" for name, owners in shared.items()]
            _log.warning("classes with the same prompts count as one: %s", "; ".join(each))
        reference = self.setup.reference
        if reference is not None and reference.skipped:
            _log.warning("reference set: unreadable images left out: %d", len(reference.skipped))
        self._log_anchors()

    def _log_anchors(self) -> None:
        setup = self.setup
        groups = [needs_of(setup.method, task).anchors for task in setup.tasks]
        if setup.vocabulary is not None:
            _log.info(
                "vocabulary: %d words; repeated and left out: %d",
                len(setup.vocabulary.words),
                setup.vocabulary.repeated,
            )
        if any(groups):
            left_out = {
                task.name: anchor_texts(of, setup.tasks, index, setup.vocabulary).left_out
                for index, (task, of) in enumerate(zip(setup.tasks, groups, strict=True))
                if index >= setup.earlier
            }
            counts = ", ".join(f"{name} {count}" for name, count in left_out.items() if count)
            _log.info("text anchors left out for a class of the same name: %s", counts or "none")

    def _learn_task(
        self, index: int, task: Task, learner: TaskLearner, saved: Mapping[str, Any] | None
    ) -> None:
        steps = steps_of(self.setup.config, len(task.train), self.setup.world.size)
        self.reporter.start_task(index, task, steps, self.steps)
        if saved is None and self.setup.config.head_drift and self.statistics.tasks:
            self.sample = self._sample(task)
        taken = learner.learn(
            index,
            task,
            Listeners(self.reporter.step, self.progress.advance),
            saves=self.saves,
            saved=saved,
        )
        self.progress.skip(steps=steps - taken)
        self.steps += taken

    def _end_task(self, task: Task) -> None:
        if task.name in [of.task for of in self.statistics.tasks]:
            return
        with self.saves.after_task():
            self._check_weights(f"task {task.name}, after its last step")
            self._keep_statistics(task)
        self.saves.save()
        self.signals.raise_pending()

    def _done(self) -> dict[str, Any]:
        # The rows of results include that of the weights after the learned tasks.
        return {
            "learned": self.learned,
            "steps": self.steps,
            "statistics": {"kept": self.statistics.state(), "sample": self.sample},
            "rows": sum(learned <= self.learned for _, learned in self.rows.planned),
        }

    def _keep_statistics(self, task: Task) -> None:
        if self.sample is not None:
            after = self._sample(task)
            self.statistics, self.sample = self.statistics.shifted(self.sample, after), None
        if not (self.setup.config.head and task.classes):
            return
        self.progress.stage(f"class statistics of {task.name}", TEACHERS, len(task.train))
        moments = class_moments(task, self.setup, self.progress.advance)
        self.statistics = self.statistics.with_task(*moments)

    def _sample(self, task: Task) -> Tensor:
        images = sum(map(len, sample(task)))
        self.progress.stage(f"a sample of {task.name}", TEACHERS, images)
        return sample_features(task, self.setup, self.progress.advance)

    def _save(self, learned: int, row: Row) -> None:
        # All processes take part where weights are sharded; one writes.
        model, folder = self.setup.model, self.setup.folder
        state = model.checkpoint()
        whole = model.checkpoint(whole=True) if model.packaged else None
        adapters = {} if model.adapters is None else model.adapters.checkpoint()
        if folder is not None:
            figures = {name: round(each.accuracy, 4) for name, each in row.answers.items()}
            description = self.setup.description(learned, figures)
            path = folder.checkpoint_path(learned, self.setup.tasks[learned - 1].name)
            save_weights(model, path, state, description)
            publish(model, path, folder.latest, whole, description)
            kept = {name: value.cpu() for name, value in self.setup.method.kept().items()}
            for checkpoint in (path, folder.latest):
                if self.statistics.tasks:
                    write_statistics(statistics_of(checkpoint), self.statistics)
                for file, tensors in ((kept_of, kept), (adapters_of, adapters)):
                    if tensors:
                        save_tensors(file(checkpoint), tensors, {"format": "pt"})
