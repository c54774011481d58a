"""Evaluating a checkpoint as the run that saved it did, on its tasks or on others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulki.choices.options import field_name, flag
from mulki.clip.evaluation import Evaluator, LabelSpace
from mulki.clip.head import ClassStatistics, Head, read_statistics
from mulki.clip.models import VisionLanguageModel
from mulki.data import Task
from mulki.data.loader import batches
from mulki.errors import InputError
from mulki.runs.predictions import TaskPredictions
from mulki.train.config.precision import as_tested, device_of
from mulki.train.config.run_config import RunConfig, read_config, resolve
from mulki.train.config.tasks import limit_reading, load_tasks
from mulki.train.saving.checkpoints import (
    ARGUMENTS,
    description_of,
    load_checkpoint,
    run_of,
    statistics_of,
)
from mulki.train.saving.description import Description
from mulki.train.saving.recovery import changed
from mulki.train.start.continuation import earlier_tasks
from mulki.train.start.data import Data
from mulki.train.start.hashes import hashes_of, parts_of
from mulki.train.start.start_model import as_in_its_run

# Options of a run that say what its tasks are, by the name of their field, and those that choose
# among their images.
_CLASSES = ("tasks", "order", "protocol", "scenario", "increments", "base_classes")
_OF_TASKS = (
    *(*_CLASSES, "test_fraction", "shots", "seed", "limit_images", "skip_bad_images"),
    *("csv_img_key", "csv_caption_key", "csv_separator"),
)
# And those that have a say in how features are computed.
_OF_FEATURES = (
    *("data_root", "max_pixels", "max_member_mb", "batch_size_eval", "precision", "precision_eval"),
    *("head", "head_weight", "head_shrinkage"),
)
_LOCKS = ("lock_text", "lock_image")

#: Fields of `RunConfig` that a user may give: none that chooses training images alone.
OPTIONS = (
    *(name for name in _OF_TASKS if name not in ("shots", "seed")),
    *(*_OF_FEATURES, "import_", "model", "workers", "device"),
)


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint and the tasks that it is evaluated on.

    Attributes:
        model: loaded, with its weights as the run stored them.
        tasks: in their order.
        config: the options.
        label_space: that of ``matrix.csv``, where the tasks are those of the run; else None.
        statistics: of the classes that it has learned, from the file beside it; None without one.
    """

    model: VisionLanguageModel
    tasks: Sequence[Task]
    config: RunConfig
    label_space: LabelSpace | None
    statistics: ClassStatistics | None = None

    @property
    def hashes(self) -> dict[str, Any]:
        """Of weights, prompts and splits, as `env.json` of a run has them."""
        return hashes_of(Data(self.tasks), self.model)

    def predictions(self) -> Iterator[TaskPredictions]:
        """The predictions for each task with classes, in turn.

        Raises:
            InputError: features that are not finite.
            BadImage: an image cannot be decoded.
        """
        evaluator, count, head = self._evaluator(), len(self.tasks), self._head()
        classes = [number for number in range(count) if self.tasks[number].classes]
        classifiers = {number: evaluator.classifier(number) for number in classes}
        for number in classes:
            task = self.tasks[number]
            spaces = [range(number, number + 1), range(count)]
            names = [task.test.name(i) for i in range(len(task.test))]
            asked = [
                (space, by) for by in ([None] if head is None else [None, head]) for space in spaces
            ]
            own, union, *of_head = evaluator.predictions(number, classifiers, asked)
            with_head = None
            if of_head:
                with_head = TaskPredictions(task.name, names, of_head[0], of_head[1])
            yield TaskPredictions(task.name, names, own, union, with_head)

    def recalls(self) -> dict[str, dict[str, tuple[float, int]]]:
        """By each task of captions, and by metric: percent, and the number of queries.

        Raises:
            InputError, BadImage: as `predictions`.
        """
        evaluator, found = self._evaluator(), {}
        for number, task in enumerate(self.tasks):
            if not task.classes:
                (answers,) = evaluator.answers(number, {number: evaluator.classifier(number)}, [0])
                found[task.name] = answers.metrics()
        return found

    def _head(self) -> Head | None:
        if self.statistics is None:
            return None
        config, model = self.config, self.model
        weights = config.head_shrinkage, config.head_weight
        return Head(self.statistics, self.tasks, float(model.logit_scale), *weights, model.device)

    def _evaluator(self) -> Evaluator:
        config, model = self.config, self.model
        loaders = [
            batches(
                task.test,
                model.preprocess,
                config.batch_size_eval,
                workers=config.workers,
                pin_memory=model.device.type == "cuda",
            )
            for task in self.tasks
        ]
        return Evaluator(as_tested(model, config.precision_eval), self.tasks, loaders)


def evaluation(checkpoint: Path, given: Mapping[str, Any]) -> Evaluation:
    """Load a checkpoint and the tasks to evaluate it on.

    Args:
        checkpoint: see `mulki.train.saving.checkpoints.load_checkpoint`.
        given: values by the name of a field in `OPTIONS`. What is left out is as in the run that
            the checkpoint lies in, or was copied from; options of its tasks only where no tasks are
            given. Modules that the run has imported are not: they have to be given.

    Raises:
        InputError: a bad checkpoint, bad options or bad tasks, no tasks, those of the run are
            not what it learned, or a test fraction for them.
    """
    if not checkpoint.exists():
        raise InputError(
            f"{checkpoint}: no such file or folder; pass a checkpoint or the folder of a run"
        )
    run, said = run_of(checkpoint), description_of(checkpoint)
    # A checkpoint that was copied out of its run says itself how that was made.
    recipe = {} if said is None else {field_name(k): v for k, v in said.recipe.items()}
    known = recipe if run is None else read_config(run / ARGUMENTS)
    imports = known.get("import_")
    if imports and "import_" not in given:
        # The folder may be from elsewhere, and this would run its code.
        files = " ".join(map(str, imports if isinstance(imports, list) else [imports]))
        raise InputError(
            f"{checkpoint}: its run has imported {files}; look at what that runs, and pass "
            f"--import {files}"
        )
    kept = (*_OF_FEATURES, *_LOCKS, *(() if "tasks" in given else (*_OF_TASKS, "test_tasks")))
    options = {name: known[name] for name in kept if name in known} | dict(given)
    if "tasks" not in options:
        raise InputError(
            f"--tasks: got none, and neither {checkpoint} nor a run folder around it names them; "
            "pass a sequence, or task folders and CSV files"
        )
    if "test_fraction" in given and "tasks" not in given:
        raise InputError(
            f"--test-fraction: got {given['test_fraction']} for the tasks of the run, which tests "
            "the images that it has not learned; leave it out, or pass --tasks"
        )
    # The preset of the bundled model is for training.
    named = options.pop("model", None)
    config = resolve({"lock_text": False, "precision": "fp32", **options}).run
    device = device_of(config.device)
    limit_reading(config)
    tasks = load_tasks(config, test_only=True, inherited="tasks" not in given)
    if config.test_tasks and said is not None:
        new = {task.name for task in tasks}
        earlier = earlier_tasks(config, [task for task in said.tasks if task.name not in new])
        tasks = [*(task for task in earlier if len(task.test)), *tasks]
    label_space: LabelSpace | None = None
    if known and not given.keys() & {*_CLASSES}:
        whole = not given.keys() & {*_OF_TASKS} and all(len(task.train) for task in tasks)
        if run is not None:
            _check_same(run, tasks, ("prompts", "splits") if whole else ("prompts",))
        elif said is not None:
            _check_prompts(checkpoint, said, tasks)
        label_space = known.get("label_space", "task")
    model = load_checkpoint(checkpoint, named, device=device)
    as_in_its_run(model, str(checkpoint), config)
    file = statistics_of(checkpoint)
    statistics = read_statistics(file) if config.head and file.is_file() else None
    for name in ("head", "head_weight", "head_shrinkage") if statistics is None else ():
        if name in given and (config.head or name != "head"):
            why = f"there is no {file}" if config.head else "the head is off (--no-head)"
            raise InputError(
                f"{flag(name)}: got {getattr(config, name)}, but no head of class statistics is "
                f"used, since {why}; leave it out"
            )
    return Evaluation(model, tasks, config, label_space, statistics)


def _check_prompts(checkpoint: Path, said: Description, tasks: Sequence[Task]) -> None:
    # Of the tasks that it has learned; those that came later in its run are not in there.
    found = {task.name: (task.classes, task.templates, task.texts) for task in tasks}
    for task in said.tasks:
        if found.get(task.name) != (task.classes, task.templates, task.texts):
            raise InputError(
                f"{checkpoint}: has learned a task {task.name} with other class names or prompts "
                "than that of the same name here has now; restore it, or pass --tasks"
            )


def _check_same(run: Path, tasks: Sequence[Task], names: Sequence[str]) -> None:
    # A run that was started from Python may have had tasks that no option names.
    parts = parts_of(tasks)
    # Of tasks of an earlier run that have no images there is nothing to compare.
    name = changed(run, {name: parts[name] for name in names}, some=True)
    if name is not None:
        raise InputError(
            f"{run}: its args.yaml names tasks whose {name} are not those in its env.json; restore "
            "them, or pass --tasks"
        )
