"""What a model says of each test image: accuracies, those of each class, confusion, CSV files."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mulki.errors import InputError
from mulki.files import write_atomic

IntArray = npt.NDArray[np.int64]

#: How many classes are kept of each image.
TOP = 5


@dataclass(frozen=True, eq=False)
class Predictions:
    """The answers of a model on one data set, among the classes of some tasks.

    Classes with the same prompts are one, called by the first of them.

    Attributes:
        classes: task and name of each class in the label space, [C].
        target: the right class of each image in the order of the set, as a place in `classes`, [n].
        ranked: the likeliest classes, best first, [n, k], k = min(5, distinct classes).
        probability: of the likeliest class, [n].
    """

    classes: Sequence[tuple[str, str]]
    target: IntArray
    ranked: IntArray
    probability: npt.NDArray[np.float32]

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether the likeliest class is the right one, [n]."""
        return np.asarray(self.ranked[:, 0] == self.target)

    @property
    def in_top(self) -> npt.NDArray[np.bool_] | None:
        """Whether the right class is among the likeliest five, [n]; None with five classes."""
        if self.ranked.shape[1] < TOP or len(self.classes) <= TOP:
            return None
        return np.asarray((self.ranked == self.target[:, None]).any(axis=1))

    def of_classes(self) -> dict[int, tuple[int, int]]:
        """Right answers and images of each class that has images, by its place."""
        right, images = Counter(self.target[self.right].tolist()), Counter(self.target.tolist())
        return {place: (right[place], images[place]) for place in sorted(images)}

    def confusion(self) -> Counter[tuple[int, int]]:
        """Images by right and predicted class, as places; cells without images are left out."""
        return Counter(zip(self.target.tolist(), self.ranked[:, 0].tolist(), strict=True))


def percent(right: npt.NDArray[np.bool_]) -> float:
    """How many are true, in percent."""
    return 100 * int(right.sum()) / len(right)


def figures(parts: Sequence[Predictions]) -> dict[str, float | None]:
    """Accuracies in percent over the images of one or several data sets with one label space.

    Returns:
        `acc1`, `acc5` (None with five classes or fewer) and `mean_per_class_recall`.
    """
    in_top = [each for part in parts if (each := part.in_top) is not None]
    right: Counter[int] = Counter()
    images: Counter[int] = Counter()
    for part in parts:
        for place, (hits, count) in part.of_classes().items():
            right[place] += hits
            images[place] += count
    recalls = [100 * right[place] / images[place] for place in images]
    return {
        "acc1": percent(np.concatenate([part.right for part in parts])),
        "acc5": percent(np.concatenate(in_top)) if len(in_top) == len(parts) else None,
        "mean_per_class_recall": float(np.mean(recalls)),
    }


@dataclass(frozen=True, eq=False)
class TaskPredictions:
    """The predictions for the test images of one task.

    Attributes:
        task: its name.
        names: of the images, [n].
        own: among the classes of the task.
        union: among the classes of all tasks.
        with_head: the same by the head of class statistics; None where there are none.
    """

    task: str
    names: Sequence[str]
    own: Predictions
    union: Predictions
    with_head: TaskPredictions | None = None

    def label_spaces(self) -> Iterator[tuple[str, Predictions]]:
        """`task` and `all`, as the files call them, with their predictions."""
        yield "task", self.own
        yield "all", self.union


def write_predictions(path: Path, tasks: Iterable[TaskPredictions]) -> None:
    """A line for each image and label space: the right class and the likeliest five."""
    header = ["task", "image", "class", "among", "predicted", "predicted_task", "probability"]
    rows: list[Sequence[Any]] = [header + [f"top{n}" for n in range(2, TOP + 1)]]
    for of in tasks:
        for among, found in of.label_spaces():
            for i, name in enumerate(of.names):
                ranked = [found.classes[place] for place in found.ranked[i]]
                rest = [each for _, each in ranked[1:]]
                task, predicted = ranked[0]
                target = found.classes[found.target[i]][1]
                chance = f"{found.probability[i]:.4f}"
                rows.append(
                    [of.task, name, target, among, predicted, task, chance]
                    + rest
                    + [""] * (TOP - 1 - len(rest))
                )
    _write(path, rows)


def write_classes(path: Path, tasks: Iterable[TaskPredictions]) -> None:
    """A line for each class and label space: images, right answers, accuracy in percent."""
    rows: list[Sequence[Any]] = [["task", "class", "among", "images", "right", "accuracy"]]
    for of in tasks:
        for among, found in of.label_spaces():
            for place, (right, images) in found.of_classes().items():
                name = found.classes[place][1]
                rows.append([of.task, name, among, images, right, f"{100 * right / images:.4f}"])
    _write(path, rows)


def write_confusion(path: Path, tasks: Iterable[TaskPredictions]) -> None:
    """A line for each pair of a right and a predicted class that has images."""
    rows: list[Sequence[Any]] = [
        ["task", "class", "among", "predicted_task", "predicted", "images"]
    ]
    for of in tasks:
        for among, found in of.label_spaces():
            for (target, predicted), images in sorted(found.confusion().items()):
                task, name = found.classes[predicted]
                rows.append([of.task, found.classes[target][1], among, task, name, images])
    _write(path, rows)


def check_writable(option: str, path: Path) -> None:
    """Check, before long work, that a file can be written later.

    Raises:
        InputError: it is a folder or a device, or lies in no folder, or in one that is read-only.
    """
    if path.is_dir():
        what = "it is a folder"
    elif not path.parent.is_dir():
        what = f"{path.parent} is no folder"
    elif path.parent == Path("/dev") or (path.exists() and not path.is_file()):
        what = "it is no ordinary file"
    elif not os.access(path.parent, os.W_OK):
        what = f"nothing can be written into {path.parent}"
    else:
        return
    raise InputError(
        f"{option}: got {path}, but {what}; pass the path of a file in a folder of yours"
    )


def csv_cells(row: Iterable[Any]) -> list[str]:
    r"""A row as text, a carriage return as ``\r``: `csv` does not quote it, and it ends a line."""
    return [str(cell).replace("\r", "\\r") for cell in row]


def _write(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(csv_cells, rows))
    write_atomic(path, text.getvalue())
