"""What a reader of a run needs of its data sets: classes, targets, and some of their images.

``tasks.json`` names the classes of each data set and gives the target of each test image, in the
order of the set, so that the answers of `mulki.runs.answers` can be told apart by class. A data set
of captions has neither.
``examples.json`` holds small copies of test images on which the start model and the last row of
``matrix.csv`` disagree.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mulki.data.caption_task import CaptionedImages
from mulki.data.subset import in_turns
from mulki.data.task import Task
from mulki.errors import InputError
from mulki.files import from_json, write_atomic
from mulki.runs.answers import Answers

#: The files in a run folder.
TASKS, EXAMPLES = "tasks.json", "examples.json"

# Longer side of a copy in pixels, and copies of each data set that were gained, and lost.
_SIDE, _EACH = 96, 4


@dataclass(frozen=True)
class DataSet:
    """A data set as reports need it.

    Args:
        name: of the task.
        classes: their names.
        targets: class of each test image.
        train: number of training images.
    """

    name: str
    classes: tuple[str, ...]
    targets: tuple[int, ...]
    train: int


@dataclass(frozen=True)
class Example:
    """A test image on which two models disagree.

    Args:
        data_set: its name.
        kind: "gained" where the start model was wrong and the later one is right, else "lost".
        target: the name of its class, or its first caption.
        before: the class or caption that the start model says, None where that was not kept.
        after: what the later model says.
        image: WebP in base64, at most 96 pixels wide and high.
    """

    data_set: str
    kind: str
    target: str
    before: str | None
    after: str | None
    image: str


def write_tasks(folder: Path, tasks: Sequence[Task]) -> None:
    """Write ``tasks.json`` for the tasks of a run."""
    sets = [
        {
            "name": task.name,
            "classes": list(task.classes),
            "targets": [int(target) for target in task.test.targets] if task.classes else [],
            "train": len(task.train),
        }
        for task in tasks
    ]
    write_atomic(folder / TASKS, json.dumps({"tasks": sets}) + "\n")


def read_tasks(folder: Path) -> dict[str, DataSet]:
    """The data sets of a run by name; none where the file is missing.

    Raises:
        InputError: the file is damaged.
    """
    found = {}
    for given in _entries(folder / TASKS, "tasks"):
        try:
            each = DataSet(
                str(given["name"]),
                tuple(map(str, given["classes"])),
                tuple(map(int, given["targets"])),
                int(given["train"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise _damaged(folder / TASKS) from None
        if not all(0 <= target < len(each.classes) for target in each.targets):
            raise _damaged(folder / TASKS)
        found[each.name] = each
    return found


def write_examples(
    folder: Path,
    tasks: Sequence[Task],
    before: Mapping[str, Answers],
    after_task: str,
    after: Mapping[str, Answers],
) -> None:
    """Write ``examples.json``, with images of as many classes as there are.

    Args:
        folder: of the run.
        tasks: of the run, in their order.
        before: the answers of the start model, by data set.
        after_task: the name of the later row.
        after: its answers.
    """
    classes = [name for task in tasks for name in task.classes]
    examples = []
    for task in tasks:
        if task.name not in after:
            continue  # no image of it is there
        old, new = before[task.name], after[task.name]
        if isinstance(task.test, CaptionedImages):
            targets: Sequence[int] = range(len(task.test))  # no two images alike
            names: Sequence[str] = [captions[0] for captions in task.test.captions]
            every: Sequence[str] = task.test.texts()
        else:
            targets, names, every = task.test.targets, task.classes, classes
        for kind, which in (("gained", ~old.own & new.own), ("lost", old.own & ~new.own)):
            places = np.flatnonzero(which).tolist()
            for turn in in_turns([targets[place] for place in places])[:_EACH]:
                place = places[turn]
                examples.append(
                    Example(
                        task.name,
                        kind,
                        names[targets[place]],
                        None if old.said is None else every[old.said[place]],
                        None if new.said is None else every[new.said[place]],
                        _copy(task, place),
                    )
                )
    content = {"after_task": after_task, "examples": [asdict(each) for each in examples]}
    write_atomic(folder / EXAMPLES, json.dumps(content) + "\n")


def read_examples(folder: Path) -> list[Example]:
    """The images of a run; none where the file is missing.

    Raises:
        InputError: the file is damaged.
    """
    try:
        found = [Example(**given) for given in _entries(folder / EXAMPLES, "examples")]
        for each in found:
            texts = (each.data_set, each.kind, each.target, each.before or "", each.after or "")
            if not all(isinstance(text, str) for text in texts):
                raise _damaged(folder / EXAMPLES)
            base64.b64decode(each.image, validate=True)
    except (TypeError, ValueError):
        raise _damaged(folder / EXAMPLES) from None
    return found


def _copy(task: Task, place: int) -> str:
    image = task.test.load(place)
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=80)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _entries(path: Path, key: str) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        found = from_json(path.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise _damaged(path)
    return found


def _damaged(path: Path) -> InputError:
    return InputError(f"{path}: not what a run writes; restore or remove the file")
