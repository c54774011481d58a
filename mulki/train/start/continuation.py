"""A run that goes on from a finished one, or from a checkpoint of it, with new tasks.

It is as if both were one run: its start model is the one that the first task began with, the tasks
that were learned come first, and in place of learning them their weights are loaded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mulki import methods
from mulki.choices.options import convert, field_name
from mulki.clip.models import VisionLanguageModel
from mulki.clip.tensor_files import CHECKSUM, load_tensors, read_metadata
from mulki.data import CaptionTask, Source, Task, load_sequence, sequence_names
from mulki.data.class_order import Relabelled
from mulki.data.image_files import ImageFiles
from mulki.data.sequences import has_validation
from mulki.data.subset import few_shot, held_back, limited
from mulki.distributed.parts import set_whole
from mulki.errors import InputError
from mulki.train.config.run_config import RunConfig, csv_form, import_given, read_config
from mulki.train.saving.checkpoints import (
    ARGUMENTS,
    adapters_of,
    description_of,
    kept_of,
    run_of,
    statistics_of,
    weights_of,
)
from mulki.train.saving.description import Description, LearnedTask

_log = logging.getLogger(__name__)

# Options of the earlier run that belong to its tasks, or to it alone.
_ITS_OWN = frozenset(
    {"tasks", "order", "scenario", "increments", "base_classes", "lr_of", "import_", "continue_"}
)
_NOTHING = ImageFiles(Path(), (), (), ())


class NamedTask(Task):
    """A task that was learned, of which no image is there: it has its class names alone."""

    def __post_init__(self) -> None:
        pass  # they were checked when it was learned


@dataclass(frozen=True)
class Continuation:
    """What a run goes on from.

    Attributes:
        said: by the checkpoint, of itself.
        weights: files by the number of learned tasks; that of all of them at least.
    """

    said: Description
    weights: Mapping[int, Path]

    @property
    def checksum(self) -> str:
        """Of the file that the run goes on from."""
        return read_metadata(self.weights[len(self.said.tasks)])[CHECKSUM]

    def fingerprint(self) -> str:
        """Hex SHA-256 of all files, with those beside them; each is read once to see it is whole.

        Raises:
            InputError: a damaged file.
        """
        hashes = [
            load_tensors(each)[1].get(CHECKSUM) if each.is_file() else None
            for _, file in sorted(self.weights.items())
            for each in (file, statistics_of(file), kept_of(file), adapters_of(file))
        ]
        return hashlib.sha256(repr(hashes).encode()).hexdigest()


def continuation(path: Path) -> Continuation:
    """What there is to go on from.

    Args:
        path: the folder of a run, or a checkpoint, as of
            `mulki.train.saving.checkpoints.load_checkpoint`. Where it lies in a run, the weights
            after its earlier tasks are found, and those of the run that this one has gone on from.

    Raises:
        InputError: no checkpoint, or one that does not say what it is.
    """
    said = description_of(path)
    if said is None or not said.tasks:
        what = "does not say what it has learned" if path.exists() else "no such file or folder"
        raise InputError(
            f"--continue: {path}: {what}; pass the folder of a run that has learned a task, or a "
            "checkpoint of one, or start from other weights with --model and --original"
        )
    weights: dict[int, Path] = {}
    place: Path | None = path
    seen = set[Path]()
    while place is not None and place not in seen:
        seen.add(place)
        run = run_of(place)
        files = [] if run is None else sorted((run / "checkpoints").glob("task_*.safetensors"))
        for file in (weights_of(place), *files):
            before = description_of(file)
            count = 0 if before is None else len(before.tasks)
            if before is not None and before.tasks == said.tasks[:count]:
                weights.setdefault(count, file)
        earlier = None if run is None else read_config(run / ARGUMENTS).get("continue_")
        place = Path(str(earlier)) if earlier else None
    return Continuation(said, weights)


def continued_options(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that goes on: those given, and for all others those of the earlier run.

    Args:
        path: as of `continuation`.
        given: by the name of their field.

    Raises:
        InputError: as `continuation`; no new tasks; or modules that the earlier run has imported
            and that are not given.
    """
    said = continuation(path).said
    recipe = {field_name(name): value for name, value in said.recipe.items()}
    if len(several := given.get("methods", ())) > 1:
        raise InputError(
            f"--methods: got {' '.join(several)} beside --continue, whose options are those of one "
            "method; run them one by one"
        )
    if given.get("preset", recipe.get("preset")) != recipe.get("preset"):
        raise InputError(
            f"--preset: got {given['preset']} beside --continue, whose options are those of "
            f"{path}; name the options that are to change"
        )
    if "tasks" not in given:
        raise InputError(
            f"--continue: got no tasks to learn beside {path}, which has learned "
            f"{', '.join(task.name for task in said.tasks)}; name new ones"
        )
    imports = recipe.get("import_")
    if imports and not given.get("import_"):
        # The checkpoint may be from elsewhere, and this would run its code.
        files = " ".join(imports)
        raise InputError(
            f"--continue: {path} was made with {files}; look at what that runs, and pass "
            f"--import {files}"
        )
    import_given(given)
    divided = recipe.get("test_fraction")
    asked = convert(RunConfig, {"test_fraction": given.get("test_fraction")})["test_fraction"]
    if None not in (divided, asked) and asked != divided:
        raise InputError(
            f"--test-fraction: got {given['test_fraction']}, but the tasks of {path} were divided "
            f"with {divided}, so that images would be tested that it has learned; leave it out, "
            "or divide the new tasks into train/ and test/"
        )
    method = str(given.get("method") or next(iter(several), recipe["method"]))
    if method != recipe["method"]:
        others = {item.name for item in fields(methods.get(str(recipe["method"])).Options)}
        recipe = {name: value for name, value in recipe.items() if name not in others}
    if str(given.get("lora_rank", "")).lower() == "none":
        for name in ("lora_targets", "lora_alpha"):
            recipe.pop(name, None)
    if str(given.get("head", "")).lower() == "false":
        for name in ("head_drift", "head_shrinkage", "head_weight"):
            recipe.pop(name, None)
    if "epochs" in given:
        recipe.pop("iterations", None)
    if "iterations" in given:
        recipe.pop("epochs", None)
    kept = {name: value for name, value in recipe.items() if name not in _ITS_OWN}
    kept["test_tasks"] = _test_tasks(recipe, said.tasks[said.earlier :])
    return {**kept, **given, "method": method, "continue_": str(path)}


def _test_tasks(recipe: Mapping[str, Any], own: Sequence[LearnedTask]) -> list[str]:
    # The words for the tasks that it and earlier runs have learned, as far as they are there.
    words = [str(word) for word in recipe.get("tasks", ())]
    if recipe.get("scenario") == "cil":
        words = []  # steps of one task have no words of their own
    elif len(words) == 1 and words[0] in sequence_names():
        words = [f"{words[0]}:{task.name}" for task in own]
    words = [*map(str, recipe.get("test_tasks", ())), *words[: len(own)]]
    there = [w for w in words if w.partition(":")[0] in (*sequence_names(), "captions")]
    return [word for word in dict.fromkeys(words) if word in there or Path(word).exists()]


def earlier_tasks(
    config: RunConfig, learned: Sequence[LearnedTask], *, replayed: bool = False
) -> list[Task]:
    """The tasks that were learned, with their test images where these are there.

    Args:
        config: whose `test_tasks` say where the images are.
        learned: in their order.
        replayed: whether their training images are shown again, and so have to be there. Those that
            ``--val-fraction`` held back are not among them.

    Raises:
        InputError: images that cannot be read, or of a task or class that was not learned; or no
            training images where they are replayed.
    """
    found: dict[str, Task] = {}
    validated = set[str]()
    if config.test_tasks:
        tasks = load_sequence(
            config.test_tasks,
            skip_bad_images=config.skip_bad_images,
            test_fraction=config.test_fraction,
            test_only=True,
            inherited=True,
            form=csv_form(config),
            source=Source(config.data_root, config.protocol),
        )
        found = {task.name: task for task in tasks}
        # Of a task that is only tested, its own validation images are left out.
        validated = {
            task.name
            for word, task in zip(config.test_tasks, tasks, strict=False)  # or one word for all
            if has_validation(word, csv_form(config))
        }
    known = {task.name: task for task in learned}
    for name in found:
        if name not in known:
            raise InputError(
                f"--test-tasks: got a task {name}, which was not learned before ("
                f"{', '.join(known)}); name a folder or a file as the task is called"
            )
    without = [name for name in known if name not in found]
    if without:
        _log.warning("not tested, since their images are not there: %s", ", ".join(without))
    tasks = []
    for each in learned:
        fraction = None if each.name in validated else config.val_fraction
        tasks.append(_as_learned(each, found.get(each.name), config, replayed, fraction))
    lacking = [task.name for task in tasks if replayed and task.classes and not len(task.train)]
    if lacking:
        raise InputError(
            f"--method {config.method}: shows training images of earlier tasks again, and those of "
            f"{', '.join(lacking)} are not there; pass --test-tasks with folders that hold train/, "
            "or another --method"
        )
    return tasks


def _as_learned(
    learned: LearnedTask,
    found: Task | None,
    config: RunConfig,
    replayed: bool,
    val_fraction: float | None,
) -> Task:
    if not learned.classes and not isinstance(found, CaptionTask):
        raise InputError(
            f"--test-tasks: {learned.name} has learned captions, and a run that goes on from it "
            "needs its files; pass captions:PATH"
        )
    if learned.classes and isinstance(found, CaptionTask):
        raise InputError(
            f"--test-tasks: {learned.name} has learned {len(learned.classes)} classes, and these "
            "are captions; pass its folder or CSV file"
        )
    if found is None:
        return NamedTask(
            learned.name,
            learned.classes,
            learned.templates,
            _NOTHING,
            _NOTHING,
            texts=learned.texts,
        )
    if replayed and config.shots is not None and found.classes:
        found = few_shot(found, config.shots, config.seed)
    if config.limit_images is not None:
        found = limited(found, config.limit_images)
    if isinstance(found, CaptionTask):
        return found
    if unknown := sorted(set(found.classes) - set(learned.classes)):
        raise InputError(
            f"--test-tasks: {learned.name} has images of {unknown[0]}, which is none of the "
            f"{len(learned.classes)} classes that were learned; remove them"
        )
    if replayed and val_fraction is not None and found.val is None and len(found.train):
        found = held_back(found, val_fraction)  # the images that it was not learned from
    train, test = found.train if replayed else _NOTHING, found.test
    if found.classes != learned.classes:
        places = [learned.classes.index(name) for name in found.classes]
        train, test = Relabelled(train, places), Relabelled(test, places)
    return replace(
        found,
        classes=learned.classes,
        templates=learned.templates,
        texts=learned.texts,
        train=train,
        test=test,
        test_only=True,
        val=None,
    )


def set_weights(model: VisionLanguageModel, file: Path) -> None:
    """Give a model, which may be sharded, the weights of a checkpoint of the same architecture.

    Raises:
        InputError: the file is damaged, or lacks weights that train.
    """
    if model.adapters is not None:
        model.adapters.restore(load_tensors(adapters_of(file))[0])
        return
    saved, _ = load_tensors(file)
    mine = model.clip.state_dict()
    shapes = {name: tuple(value.shape) for name, value in saved.items()}
    missing = [n for n in model.trainable() if shapes.get(n) != tuple(mine[n].shape)]
    if missing or not saved.keys() <= mine.keys():
        raise InputError(
            f"--continue: {file} does not hold the weights of {model.name} (such as "
            f"{(missing or sorted(saved.keys() - mine.keys()))[0]}); pass the --model that the "
            "first task began with"
        )
    for name, value in saved.items():
        set_whole(mine[name], value)


def with_adapters(goes_on: Continuation, model: VisionLanguageModel) -> Continuation:
    """What a run with adapters goes on from: the weights that have adapters beside them.

    Raises:
        InputError: the last ones have none, or adapters of another rank or of other modules.
    """
    assert model.adapters is not None
    weights = {n: file for n, file in goes_on.weights.items() if adapters_of(file).is_file()}
    last = goes_on.weights[len(goes_on.said.tasks)]
    if last not in weights.values():
        raise InputError(
            f"--lora-rank: there is no {adapters_of(last)}, so {last} was learned without adapters "
            "or copied without them; copy the whole checkpoint, start from it with --model, or "
            "pass --lora-rank none"
        )
    for file in weights.values():
        saved = load_tensors(adapters_of(file))[0]
        if not model.adapters.fits(saved):
            raise InputError(
                f"--lora-rank, --lora-targets: {adapters_of(file)} has adapters of another rank or "
                "of other modules; leave both out"
            )
    return replace(goes_on, weights=weights)


def check_merged(model: VisionLanguageModel, goes_on: Continuation) -> None:
    """Raise an InputError where the model with the saved adapters is not the one that was saved."""
    assert model.adapters is not None
    file = goes_on.weights[len(goes_on.said.tasks)]
    start = {name: value.clone() for name, value in model.adapters.state().items()}
    model.adapters.restore(load_tensors(adapters_of(file))[0])
    merged = model.checkpoint(whole=True)
    model.adapters.restore(start)
    for name, value in load_tensors(file)[0].items():
        ours, theirs = merged[name].double(), value.double()
        if float((ours - theirs).norm()) > _rounding(merged[name], value) * float(theirs.norm()):
            raise InputError(
                f"--continue: {adapters_of(file)} and the start model do not give the {name} that "
                f"{file} has; pass --lora-alpha and --model as in the earlier run, or a checkpoint "
                "that was copied whole"
            )


def _rounding(one: Tensor, other: Tensor) -> float:
    # How far the same weights may be from each other, as a part of their length.
    if not other.is_floating_point():
        return 0.0
    eps = [torch.finfo(each.dtype).eps for each in (one, other)]
    if one.dtype == other.dtype == torch.float32:
        return 8 * eps[0]  # of products on another device
    # In half precision few elements are rounded to the other side; stored in another, all are.
    return max(eps) / (8 if one.dtype == other.dtype else 1)


def check_begin(said: Description, hashes: Mapping[str, Any]) -> None:
    """Raise an InputError where the start model is not the one that the first task began with."""
    if hashes.get("original", hashes["weights"]) != said.weights:
        raise InputError(
            "--continue: the start model is not the one that the first task began with, its "
            "weights have another hash; pass that one as --model and --pretrained"
        )
