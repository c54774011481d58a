"""The folder of one run: everything needed to read its results and to repeat it.

``<logs>/<name>/`` holds

==================  ==========================================================================
``args.yaml``       the resolved configuration
``env.json``        versions, machine, commit, hashes of weights, splits and prompts
``out.log``         what was logged
``results.jsonl``   one line per evaluation, see :mod:`mulki.runs.results`
``matrix.csv``      accuracies in percent, see :func:`mulki.runs.metrics.read_matrix`
``history.jsonl``   one line per logged step, see :mod:`mulki.runs.history`
``tasks.json``      classes and targets of the data sets, see :mod:`mulki.runs.catalog`
``examples.json``   images on which start model and last model disagree, see the same
``answers/``        which test images were right, see :mod:`mulki.runs.answers`
``summary.json``    metrics with their definitions, status, tasks, seconds, and what was used
                    beyond the tasks and the start model
``summary.md``      the printed table, written by :func:`mulki.report.write_report`
``report.html``     all of the above on one page, written by the same function
``tensorboard/``    curves, see :mod:`mulki.runs.trackers`; ``wandb/`` likewise
``checkpoints/``    ``task_01_name.safetensors`` ..., ``latest/``
``recovery/``       what ``mulki run --resume`` goes on from, until the run is complete
==================  ==========================================================================

However a run ends, the results so far can be read: whole lines are appended and files are replaced
atomically. So the folder of a killed run needs no repair. ``summary.json`` says ``running`` until
the run has ended, then ``complete`` or ``interrupted``. Of a run that was killed it still says
``running``; :func:`mulki.report.read_folder` tells such a run from one that goes on. One process at
a time writes to a folder.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Literal

import yaml

from mulki.errors import InputError
from mulki.files import check_regular, from_json, sweep, sync, write_atomic
from mulki.runs.answers import ACC1, RECALL1, Answers, seen_accuracy, write_answers
from mulki.runs.environment import environment
from mulki.runs.lock import FolderLock
from mulki.runs.log import run_log
from mulki.runs.metrics import (
    ACC1_SEEN,
    ACC1_SEEN_HEAD,
    ALL_SEEN,
    DEFINITIONS,
    ZERO_SHOT,
    AccuracyMatrix,
    ClassIncremental,
    read_matrix,
    write_matrix,
)
from mulki.runs.new_folder import RECOVERY, default_name, make_folder, slug
from mulki.runs.results import Evaluation, class_incremental, read_evaluations
from mulki.runs.trackers import AUTO, Tracker, open_trackers
from mulki.runs.with_head import WithHead

logger = logging.getLogger(__name__)

Status = Literal["running", "complete", "interrupted"]


class RunFolder:
    """Writer of one run folder; made by :meth:`create` or, to resume, by :meth:`open`.

    Used as a context manager it attaches ``out.log``, opens the trackers of its configuration
    (``report_to``) and finishes the run: ``complete`` when the block ends, ``interrupted`` when an
    exception (or Ctrl-C) leaves it. In a distributed run only the first rank may have one.

    Attributes: ``path``, ``name``, ``method``, ``model``, ``order``, ``seed``, ``status``,
    ``uses``; the results so far are ``matrix``, an :class:`AccuracyMatrix`,
    ``class_incremental``, the :class:`ClassIncremental` of the rows that came with answers, and
    ``with_head``, a :class:`WithHead`, None where a row has no head of class statistics.
    """

    def __init__(
        self,
        path: Path,
        *,
        method: str,
        order: str,
        seed: int,
        matrix: AccuracyMatrix,
        test_images: Mapping[str, int] | None = None,
        seconds: float = 0.0,
        status: Status = "running",
        uses: tuple[str, ...] = (),
        lock: FolderLock | None = None,
    ) -> None:
        self.path = path
        self.name = Path(os.path.abspath(path)).name  # "." has a name too
        self.method = method
        self.order = order
        self.seed = seed
        self.model = ""
        self.matrix = matrix
        self.class_incremental = ClassIncremental({})
        self.with_head = WithHead.of_lines((), matrix.columns, ())
        self.status: Status = status
        self.uses = tuple(uses)
        self._lock = lock
        self._test_images = dict(test_images or {})
        self._started = time.monotonic() - seconds
        self._trackers: list[Tracker] = []

    @classmethod
    def create(
        cls,
        logs: str | os.PathLike[str],
        name: str | None = None,
        *,
        method: str,
        order: str,
        seed: int,
        columns: tuple[str, ...],
        config: Mapping[str, object],
        hashes: Mapping[str, object] | None = None,
        uses: tuple[str, ...] = (),
        parameters: Mapping[str, int] | None = None,
        learned_before: tuple[str, ...] = (),
        learned_with: tuple[Mapping[str, object], ...] = (),
    ) -> RunFolder:
        """Make ``<logs>/<name>/`` with ``args.yaml``, ``env.json`` and an empty summary.

        ``columns`` are the data sets that will be evaluated, ``config`` the resolved
        configuration, ``hashes`` those for :func:`environment`, ``uses`` what the method uses
        beyond the tasks and the start model, in words, ``parameters`` how many there are,
        ``learned_before`` the tasks of earlier runs, for ``env.json``, and ``learned_with`` how
        many each of them had and which options were others there. A folder whose run ended before
        its first evaluation is taken again. Raises :class:`InputError` for another folder that
        exists and is not empty, one that cannot be made or that another process has, and a name
        that is not one path component.
        """
        matrix = AccuracyMatrix(columns=tuple(columns))
        path, lock = make_folder(Path(logs), name, default_name(method, order, seed, config))
        run = cls(path, method=method, order=order, seed=seed, matrix=matrix, uses=uses, lock=lock)
        run.model = str(config.get("model", ""))
        # First: a folder with this file is one of ours, while anyone may have an args.yaml.
        of_run = {
            "date": datetime.date.today().isoformat(),
            "parameters": parameters,
            "learned_before": list(learned_before),
            "learned_with": list(learned_with),
        }
        write_atomic(path / "env.json", _json(environment(hashes) | of_run))
        write_atomic(path / "args.yaml", yaml.safe_dump(_plain(config), sort_keys=False))
        run._write_summary()
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str], lock: FolderLock | None = None) -> RunFolder:
        """Open an existing run folder to go on where it stopped (see ``matrix.tasks``).

        Evaluations whose row was never written are removed, and what a killed process left of
        files that it was writing. Raises :class:`InputError` for a folder without a readable
        ``summary.json`` or with another file that cannot be read.
        """
        path = Path(path)
        for each in path.iterdir() if path.is_dir() else ():
            check_regular(each)
        try:
            summary = from_json((path / "summary.json").read_text(encoding="utf-8"))
            run = cls(
                path,
                method=summary["method"],
                order=summary["order"],
                seed=summary["seed"],
                matrix=AccuracyMatrix(columns=tuple(summary["columns"])),
                test_images=summary["test_images"],
                seconds=summary["seconds"],
                status=summary["status"],
                # Folders of before it was written have none.
                uses=tuple(summary.get("uses", ())),
                lock=lock,
            )
            run.model = str(summary.get("model", ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: not the folder of a run, its summary.json cannot be read "
                f"({type(error).__name__}); pass a folder that a run has written"
            ) from None
        # The matrix is written before the summary, so it is the one to trust.
        if (path / "matrix.csv").exists():
            run.matrix = read_matrix(path / "matrix.csv")
        sweep(path)
        results = path / "results.jsonl"
        if results.exists():
            rows = dict(run.matrix.named_rows())
            lines = [line for line in read_evaluations(results) if line.after_task in rows]
            run.class_incremental = class_incremental(lines, run.matrix.tasks)
            run.with_head = WithHead.of_lines(lines, run.matrix.columns, run.matrix.tasks)
            write_atomic(results, "".join(f"{json.dumps(asdict(line))}\n" for line in lines))
        return run

    def __enter__(self) -> RunFolder:
        config = yaml.safe_load((self.path / "args.yaml").read_text(encoding="utf-8")) or {}
        report_to = config.get("report_to", [AUTO])
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_log(self.path / "out.log"))
            self._trackers = open_trackers(report_to, self.path, self.name, config)
            for tracker in self._trackers:
                stack.callback(tracker.close)
            self._opened = stack.pop_all()
        if self.status == "interrupted":
            self.status = "running"
            self._write_summary()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None and self.status != "complete":
                self.finish()
            elif error is not None:
                unexpected = isinstance(error, Exception) and not isinstance(error, InputError)
                logger.error(
                    "run stopped by %s: %s", type(error).__name__, error, exc_info=unexpected
                )
                # An error after the last step, such as in printing, leaves the run complete.
                if self.status != "complete":
                    # A disk that is full must not hide the error that ended the run.
                    with contextlib.suppress(OSError):
                        self.finish("interrupted")
        finally:
            self._trackers = []
            self._opened.close()

    def release(self) -> None:
        """Let other processes write to the folder."""
        if self._lock is not None:
            self._lock.release()

    def scalars(self, values: Mapping[str, float], step: int, axis: str = "step") -> None:
        """Add points to the curves of the trackers, by name; `step` counts along `axis`."""
        for tracker in self._trackers:
            tracker.add(values, step, axis)

    def record(
        self,
        after_task: str,
        eval_dataset: str,
        found: Mapping[str, tuple[float, int]],
        seconds: float,
        step: int,
    ) -> None:
        """Append an :class:`Evaluation` to ``results.jsonl`` for each metric of a data set.

        ``found`` has the value of each, and the number of samples. The lines have been written to
        the file when this returns. Raises :class:`InputError` for a value that is not finite.
        """
        for metric, (value, n) in found.items():
            evaluation = Evaluation(
                run=self.name,
                order=self.order,
                seed=self.seed,
                step=step,
                after_task=after_task,
                eval_dataset=eval_dataset,
                metric=metric,
                value=float(value),
                n=int(n),
                seconds=round(float(seconds), 3),
                method=self.method,
                model=self.model,
            )
            try:
                line = json.dumps(asdict(evaluation), allow_nan=False)
            except ValueError:
                raise InputError(
                    f'{metric} on "{eval_dataset}" after "{after_task}": got {value}, wanted a '
                    "finite number; the model has diverged: lower the learning rate"
                ) from None
            with (self.path / "results.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
            sync(self.path / "results.jsonl")
            if eval_dataset in self.matrix.columns and metric in (ACC1, RECALL1):
                self._test_images[eval_dataset] = evaluation.n
            curves = {f"{eval_dataset}/{metric}": value}
            if metric == ACC1:
                # As open_clip calls it, a fraction there.
                curves[f"val/{eval_dataset}-zeroshot-val-top1"] = value / 100
            self.scalars(curves, step)

    def add_answers(
        self,
        after_task: str,
        answers: Mapping[str, Answers],
        *,
        seconds: Mapping[str, float],
        step: int,
    ) -> None:
        """Record what one model answered on every column, and add its row.

        ``after_task`` and errors are as in :meth:`add_row`, ``step`` and ``seconds``, by column,
        as in :class:`Evaluation`. Accuracies go to ``results.jsonl``, the answers to ``answers/``.
        """
        for name, each in answers.items():
            self.record(after_task, name, each.metrics(), seconds[name], step)
        learned = {name: each for name, each in answers.items() if each.seen is not None}

        def record_seen(metric: str, seen: Iterable[Answers]) -> float:
            found = {metric: seen_accuracy(seen)}
            of_all = sum(seconds[name] for name in learned)
            self.record(after_task, ALL_SEEN, found, of_all, step)
            return found[metric][0]

        if learned:
            percent = record_seen(ACC1_SEEN, learned.values())
            after = {**self.class_incremental.after, after_task: round(percent, 4)}
            self.class_incremental = ClassIncremental(after)
        heads = [each.head for each in learned.values() if each.head is not None]
        if after_task != ZERO_SHOT:
            if heads and self.with_head is not None:
                percent = record_seen(ACC1_SEEN_HEAD, heads)
                self.with_head = self.with_head.with_row(after_task, answers, percent)
            else:
                self.with_head = None
        index = 0 if after_task == ZERO_SHOT else len(self.matrix.tasks) + 1
        # Before the matrix, so that each of its rows has answers whenever the run is killed.
        write_answers(self.path, index, after_task, answers)
        self.add_row(after_task, {name: each.accuracy for name, each in answers.items()})

    def add_row(self, after_task: str, accuracies: Mapping[str, float]) -> None:
        """Add one row to ``matrix.csv`` and bring ``summary.json`` up to date.

        ``after_task`` is the task just learned or :data:`~mulki.runs.metrics.ZERO_SHOT`;
        ``accuracies`` maps every column to its percent. Raises :class:`InputError` as
        :meth:`AccuracyMatrix.with_row` does; then nothing is written.
        """
        # Rounded as in the file, so that the metrics of the file are those of the run.
        rounded = {name: round(float(value), 4) for name, value in accuracies.items()}
        matrix = self.matrix.with_row(after_task, rounded)
        write_matrix(self.path / "matrix.csv", matrix)
        self.matrix = matrix
        self._write_summary()
        if after_task != ZERO_SHOT:
            found = matrix.metrics().to_dict()
            known = {f"metrics/{name}": value for name, value in found.items() if value is not None}
            self.scalars(known, len(matrix.tasks), "tasks")

    @property
    def rows(self) -> int:
        """The number of rows of results, the zero-shot one included."""
        return len(self.matrix.named_rows())

    def finish(self, status: Status = "complete") -> None:
        """Write ``summary.json`` with this status."""
        self.status = status
        self._write_summary()
        if status == "complete":
            # As large as several checkpoints, and of no more use.
            shutil.rmtree(self.path / RECOVERY, ignore_errors=True)

    def _write_summary(self) -> None:
        zero_shot = self.matrix.zero_shot_metrics()
        summary = {
            "status": self.status,
            "name": self.name,
            "method": self.method,
            "model": self.model,
            "order": self.order,
            "seed": self.seed,
            "uses": list(self.uses),
            "tasks": list(self.matrix.tasks),
            "columns": list(self.matrix.columns),
            "metrics": self.matrix.metrics().to_dict(),
            "class_incremental": self.class_incremental.to_dict(),
            "with_head": self.with_head.to_dict() if self.with_head else None,
            "zero_shot_metrics": zero_shot.to_dict() if zero_shot else None,
            "definitions": DEFINITIONS,
            "test_images": self._test_images,
            "seconds": round(time.monotonic() - self._started, 1),
        }
        write_atomic(self.path / "summary.json", _json(summary))

    def checkpoint_path(self, index: int, task_name: str) -> Path:
        """Return ``checkpoints/task_03_dtd.safetensors`` for `index` 3; makes the folder."""
        return self._checkpoints() / f"task_{index:02d}_{slug(task_name)[:100]}.safetensors"

    @property
    def latest(self) -> Path:
        """``checkpoints/latest``, the last saved model; the folder is made when it is saved."""
        return self._checkpoints() / "latest"

    def _checkpoints(self) -> Path:
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        return folder


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _json(value: object) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
