"""The rows of results: a model tested on all tasks, and what it answers written down."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import DataLoader

from mulki.clip.evaluation import Evaluator, Loader
from mulki.clip.head import ClassStatistics, Head
from mulki.clip.models import VisionLanguageModel
from mulki.data import Task
from mulki.data.loader import batches
from mulki.data.subset import limited
from mulki.data.vocabulary import imagenet_vocabulary
from mulki.methods import ZERO_SHOT
from mulki.runs.answers import Answers, read_answers
from mulki.runs.catalog import write_examples
from mulki.runs.metrics import ZERO_SHOT as ZERO_SHOT_ROW
from mulki.train.config.precision import as_tested
from mulki.train.display.outline import rows
from mulki.train.display.progress import TEST, RunProgress
from mulki.train.drift import IMAGES, Drift
from mulki.train.start.setup import Setup

# Memory for the transformed test images of all tasks, which every evaluation needs again; and as
# much for the samples of them.
_TEST_CACHE_MIB = 512

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """The answers of one model, and how long they took, by task; and how far it has moved."""

    answers: dict[str, Answers]
    seconds: dict[str, float]
    drift: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    drift_seconds: float = 0.0


class Rows:
    """Tests the model of a run, and writes the rows of its folder.

    Args:
        setup: of the run.
        progress: told of each test.
        frozen: models by name, of which the original one tells how far the model has moved.

    Attributes:
        planned: names of all rows, and how many tasks are learned in each.
    """

    def __init__(
        self, setup: Setup, progress: RunProgress, frozen: Mapping[str, VisionLanguageModel]
    ):
        self.planned = rows(setup)
        self._setup = setup
        self._progress = progress
        # Answers of the start model, as far as they were read.
        self._before: dict[str, Answers] | None = None
        self._evaluator = Evaluator(
            setup.tested,
            setup.tasks,
            [test_loader(setup, task) for task in setup.tasks],
            setup.world,
            setup.config.label_space,
            progress.advance,
        )
        samples = [limited(task, IMAGES) for task in setup.tasks]
        original = frozen.get(ZERO_SHOT)
        words = () if original is None else (setup.vocabulary or imagenet_vocabulary()).words
        self._drift = Drift(
            setup.tested,
            None if original is None else as_tested(original, setup.config.precision_eval),
            samples,
            [test_loader(setup, sample) for sample in samples],
            words,
            setup.world,
        )

    def of_model(self, learned: int, statistics: ClassStatistics) -> Row:
        """The row of the model as it is now, after so many tasks."""
        (row,) = self.of_heads([learned], [self.head(statistics)])
        if not learned:
            return row
        started = time.perf_counter()
        drift = self._drift.of(statistics)
        return replace(row, drift=drift, drift_seconds=time.perf_counter() - started)

    def of_heads(self, learned: Sequence[int], heads: Sequence[Head | None]) -> list[Row]:
        """A row for each number of learned tasks, with the head that there is then."""
        with_head = {
            number: head for number, head in zip(learned, heads, strict=True) if head is not None
        }
        tasks = self._setup.tasks
        found = [Row({}, {}) for _ in learned]
        classifiers, seconds = {}, {}
        for number, task in enumerate(tasks):
            self._progress.stage(f"class texts of {task.name}", TEST, len(task.test))
            started = time.perf_counter()
            classifiers[number] = self._evaluator.classifier(number)
            seconds[number] = time.perf_counter() - started
        for number, task in enumerate(tasks):
            if not len(task.test):
                continue
            self._progress.stage(f"test of {task.name}", TEST, len(task.test))
            started = time.perf_counter()
            answers = self._evaluator.answers(number, classifiers, learned, with_head)
            seconds[number] += time.perf_counter() - started
            for row, each in zip(found, answers, strict=True):
                row.answers[task.name], row.seconds[task.name] = each, seconds[number]
        return found

    def head(self, statistics: ClassStatistics) -> Head | None:
        """The head of the statistics so far; None where there are none."""
        if not statistics.tasks:
            return None
        config, model = self._setup.config, self._setup.model
        return Head(
            statistics,
            self._setup.tasks,
            float(model.logit_scale),
            config.head_shrinkage,
            config.head_weight,
            model.device,
        )

    def record(self, after_task: str, row: Row, steps: int) -> None:
        """Write a row into the run folder, where this process has it.

        Args:
            after_task: the row's name.
            row: its answers.
            steps: of training, so far.
        """
        folder = self._setup.folder
        if folder is None:
            return
        for name, values in row.drift.items():
            folder.record(after_task, name, values, row.drift_seconds, steps)
        folder.add_answers(after_task, row.answers, seconds=row.seconds, step=steps)
        shown = ", ".join(f"{name} {each.accuracy:.1f}" for name, each in row.answers.items())
        seen = folder.class_incremental.after.get(after_task)
        begin = "test of the start model" if after_task == ZERO_SHOT_ROW else f"after {after_task}"
        line = f"{begin}: {shown}"
        if seen is not None:
            line += f"; among all classes so far {seen:.1f}"
        if folder.with_head is not None and after_task != ZERO_SHOT_ROW:
            heads = folder.with_head.class_incremental.after[after_task]
            line += f", with head {heads:.1f}"
        _log.info("%s", line)
        self._progress.say(line)
        self._write_examples(after_task, row)

    def _write_examples(self, after_task: str, row: Row) -> None:
        folder = self._setup.folder
        if folder is None or after_task == ZERO_SHOT_ROW or not self._setup.method.trains:
            return
        # The results are written already, so pictures that fail do not fail the run.
        try:
            if self._before is None:
                self._before = read_answers(folder.path)[ZERO_SHOT_ROW]
            write_examples(folder.path, self._setup.tasks, self._before, after_task, row.answers)
        except Exception as error:
            _log.warning("no examples of images (%s: %s)", type(error).__name__, error)


def test_loader(setup: Setup, task: Task) -> Loader:
    """The test images of a task in batches, transformed once; nothing where there are none."""
    if not len(task.test):
        nothing: Any = []
        return DataLoader(nothing)
    return batches(
        task.test,
        setup.model.preprocess,
        setup.config.batch_size_eval * setup.world.size,
        workers=setup.config.workers,
        cached=True,
        cache_mb=_TEST_CACHE_MIB / len(setup.tasks),
        pin_memory=setup.precision.device.type == "cuda",
        part=setup.world.rows,
    )
