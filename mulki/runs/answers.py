"""Which test images each model of a run got right, and the files of a run folder that say so.

``answers/`` holds a file for each row of ``matrix.csv``: ``00_zero-shot.npz``, ``01_digits.npz``,
and so on. Its boolean arrays have an entry per test image, in the order of the test set:
``own/<data set>`` where an image was classified among the classes of its own task (or in another
label space that the run has, `mulki.clip.evaluation.LabelSpace`), and, for tasks learned by then,
``seen/<data set>`` where it was classified among the classes of all of them. The whole numbers
``said/<data set>`` are the class that was said for ``own``, by its place among the classes of all
data sets in their order; files of earlier versions lack them. Of a model with class statistics
there are ``head_own``, ``head_seen`` and ``head_said`` too, where `mulki.clip.head` answered.

Of a data set of captions, ``own`` says whether the caption that an image is nearest to is one of
its own, ``said`` is the place of that caption among the distinct ones of the test set, and there is
no ``seen``. The whole numbers ``image_ranks/<data set>`` and ``text_ranks/<data set>`` are those of
`Ranks`.

The bytes ``sha256`` are the checksum of all the others; files of earlier versions lack it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mulki.errors import InputError
from mulki.files import check_regular, check_zip, replacing
from mulki.runs.metrics import read_matrix

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int32]

#: The folder in a run folder.
FOLDER = "answers"


#: The metric in ``matrix.csv`` of a data set of classes, and that of one of captions.
ACC1, RECALL1 = "acc1", "image_to_text_R@1"
#: The accuracy of a data set of classes with the head of class statistics.
ACC1_HEAD = "acc1_head"

# Before the names of arrays of answers with the head of class statistics.
_HEAD = "head_"

# Whole numbers, which answers need not have.
_NUMBERS = ("said", f"{_HEAD}said", "image_ranks", "text_ranks")
_CHECKSUM = "sha256"
# Of the recalls that are reported.
_DEPTHS = (1, 5)


@dataclass(frozen=True, eq=False)
class Ranks:
    """How many wrong candidates are nearer to a query than its nearest right one.

    Attributes:
        images: of each test image among all captions, [n].
        texts: of each distinct caption among all test images, [m].
    """

    images: IntArray
    texts: IntArray

    def recalls(self) -> dict[str, tuple[float, int]]:
        """By open_clip's names: percent of the queries with a right one among so many, and n."""
        return {
            f"{name}_R@{depth}": (100 * int((of < depth).sum()) / len(of), len(of))
            for name, of in (("image_to_text", self.images), ("text_to_image", self.texts))
            for depth in _DEPTHS
        }


@dataclass(frozen=True, eq=False)
class Answers:
    """Which test images of a data set one model got right, in the order of the set.

    Attributes:
        own: in the label space of the run, by default the classes of the data set, [n]. Of a data
            set of captions: whether the nearest caption is one of the image's.
        seen: among the classes of all tasks learned by then, [n]; None for a data set that is not
            one of them.
        said: the class that was said for `own`, its place among the classes of all data sets of the
            run in their order, [n]; None where that was not kept. Of a data set of captions: the
            nearest one, its place among the distinct captions of the test set.
        ranks: of a data set of captions; None of one of classes.
        head: the same by the head of class statistics; None where there are none.
    """

    own: BoolArray
    seen: BoolArray | None = None
    said: IntArray | None = None
    ranks: Ranks | None = None
    head: Answers | None = None

    def metrics(self) -> dict[str, tuple[float, int]]:
        """What ``results.jsonl`` has of them: value in percent and number of tests, by metric."""
        if self.ranks is not None:
            return self.ranks.recalls()
        found = {ACC1: (self.accuracy, len(self.own))}
        if self.head is not None:
            found[ACC1_HEAD] = self.head.accuracy, len(self.own)
        return found

    @property
    def accuracy(self) -> float:
        """Of `own`, in percent."""
        return 100 * int(self.own.sum()) / len(self.own)


def seen_accuracy(answers: Iterable[Answers]) -> tuple[float, int]:
    """A_i in percent, the mean over all test images of tasks learned so far, and their number.

    See `mulki.runs.metrics.ClassIncremental`. Data sets without `seen` do not count; one has it.
    """
    seen = np.concatenate([each.seen for each in answers if each.seen is not None])
    return 100 * int(seen.sum()) / len(seen), len(seen)


def answers_path(folder: Path, index: int, after_task: str) -> Path:
    """The file of row `index` (0: zero-shot) in a run folder."""
    # Short and free of separators, whatever a task is called; the number tells rows apart.
    name = re.sub(r"[^\w-]+", "_", after_task)[:60].encode()[:180].decode(errors="ignore")
    return folder / FOLDER / f"{index:02d}_{name}.npz"


def write_answers(
    folder: Path, index: int, after_task: str, answers: Mapping[str, Answers]
) -> None:
    """Write the answers of one row, by data set, in one atomic step."""
    heads = {name: each.head for name, each in answers.items() if each.head is not None}
    content = _arrays(answers)
    content |= {f"{_HEAD}{name}": array for name, array in _arrays(heads).items()}
    for name, each in answers.items():
        if each.ranks is not None:
            content[f"image_ranks/{name}"] = each.ranks.images
            content[f"text_ranks/{name}"] = each.ranks.texts
    path = answers_path(folder, index, after_task)
    path.parent.mkdir(exist_ok=True)
    content[_CHECKSUM] = _digest(content)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **content)  # type: ignore[arg-type]  # no array is a switch


def _digest(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return np.frombuffer(digest.digest(), np.uint8)


def _arrays(answers: Mapping[str, Answers]) -> dict[str, npt.NDArray[Any]]:
    # The booleans, and the classes that were said.
    found: dict[str, npt.NDArray[Any]] = {f"own/{name}": a.own for name, a in answers.items()}
    found |= {f"seen/{name}": a.seen for name, a in answers.items() if a.seen is not None}
    return found | {f"said/{name}": a.said for name, a in answers.items() if a.said is not None}


def read_answers(folder: str | os.PathLike[str]) -> dict[str, dict[str, Answers]]:
    """Read the answers of a run folder, by row of ``matrix.csv`` and then by data set.

    A file without a row, which a run that was killed between the two can leave, is not read.

    Raises:
        InputError: no matrix or no answers, which runs of earlier versions lack; a file that is
            missing or damaged; other data sets, or other accuracies, than the matrix has.
    """
    folder = Path(folder)
    matrix = read_matrix(folder / "matrix.csv")
    if not (folder / FOLDER).is_dir():
        raise InputError(
            f"{folder / FOLDER}: no such folder; pass a run folder with answers, or run it again"
        )
    found: dict[str, dict[str, Answers]] = {}
    sizes: dict[str, int] = {}
    first = 0 if matrix.zero_shot is not None else 1
    for index, (name, accuracies) in enumerate(matrix.named_rows(), start=first):
        path = answers_path(folder, index, name)
        found[name] = _read(path, matrix.columns, matrix.tasks, index)
        for column, accuracy in zip(matrix.columns, accuracies, strict=True):
            answers = found[name][column]
            images = sizes.setdefault(column, len(answers.own))
            if len(answers.own) != images:
                raise _damaged(path, f"{len(answers.own)} images of {column}, {images} before")
            # Cells have four decimals.
            if abs(answers.accuracy - accuracy) > 1e-4:
                raise _damaged(
                    path,
                    f"{answers.accuracy:.4f} % of {column} right, {accuracy:.4f} in matrix.csv",
                )
    return found


def _read(
    path: Path, columns: tuple[str, ...], tasks: tuple[str, ...], learned: int
) -> dict[str, Answers]:
    # Of a row after so many of the tasks.
    check_regular(path)
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise _damaged(path, "no such file") from None
    except InputError:
        raise
    except Exception as error:  # numpy, zipfile and zlib each have errors of their own for damage
        raise _damaged(path, f"cannot be read: {error}") from None
    if _CHECKSUM in arrays and not np.array_equal(arrays.pop(_CHECKSUM), _digest(arrays)):
        raise _damaged(path, "its content does not have its checksum")
    captions = [name for name in columns if f"image_ranks/{name}" in arrays]
    classes = [name for name in tasks[:learned] if name not in captions]
    # One that an earlier run has learned may have no row in this one.
    classes += [n for n in columns if n not in tasks and f"seen/{n}" in arrays]
    wanted = {f"own/{name}" for name in columns} | {f"seen/{name}" for name in classes}
    if any(f"{_HEAD}said/{name}" in arrays for name in columns):
        wanted |= {f"{_HEAD}own/{name}" for name in columns if name not in captions}
        wanted |= {f"{_HEAD}seen/{name}" for name in classes}
    numbers = {f"{kind}/{name}" for kind in _NUMBERS for name in columns}
    if unlike := (arrays.keys() ^ wanted) - numbers:
        odd = min(unlike)
        raise _damaged(path, f"{odd} is {'missing' if odd in wanted else 'not expected'}")
    for key, array in arrays.items():
        dtype = np.int32 if key in numbers else np.bool_
        if array.dtype != dtype or array.ndim != 1 or not len(array):
            wrong = f"{array.dtype} {list(array.shape)}, not booleans [n]"
            raise _damaged(
                path, f"{key} is {'no list of whole numbers' if key in numbers else wrong}"
            )
    for key, array in arrays.items():
        kind, _, name = key.partition("/")
        images = len(arrays[f"own/{name}"])
        if not kind.endswith("_ranks") and len(array) != images:
            raise _damaged(path, f"{key} has {len(array)} images of {images}")
    answers = {}
    for name in columns:
        if (name in captions) != (f"text_ranks/{name}" in arrays):
            raise _damaged(path, f"one of image_ranks/{name} and text_ranks/{name} is missing")
        by_texts, by_head = (
            {
                kind: arrays[key]
                for kind in ("own", "seen", "said")
                if (key := f"{prefix}{kind}/{name}") in arrays
            }
            for prefix in ("", _HEAD)
        )
        ranks = None
        if name in captions:
            ranks = Ranks(arrays[f"image_ranks/{name}"], arrays[f"text_ranks/{name}"])
            if not np.array_equal(ranks.images == 0, by_texts["own"]):
                raise _damaged(path, f"image_ranks/{name} are not those of own/{name}")
        head = Answers(**by_head) if "own" in by_head else None
        answers[name] = Answers(**by_texts, ranks=ranks, head=head)
    return answers


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: {reason}; restore the file, or run the sequence again")
