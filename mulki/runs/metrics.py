"""Continual-learning metrics on an accuracy matrix, and the file that holds one.

``a`` is ``[T, T]``: row ``i`` is the model after learning task ``i``, column ``j`` the test set
of task ``j``, both in the order learned. Cells are top-1 accuracy in percent. Any other unit
works as well: a metric has the unit of the cells.

Transfer, Average and Last are those of ZSCL (Zheng et al., ICCV 2023), used alike by GIFT, DIKI,
CoLeCLIP and ConDU. In Transfer every task but the first counts alike, however many models precede
it. Forgetting is that of Chaudhry et al. (ECCV 2018): the drop from the best accuracy that any
*earlier* model had since the task was learned; accuracy before that does not count. It is negative
where the last model is the best of all; some implementations clip each task at zero, this one does
not. BWT is that of Lopez-Paz and Ranzato (NeurIPS 2017) and is what GIFT reports as "Forget". Both
are means over all tasks but the last. Some published code leaves one more task out of the sum but
divides by the same number, which gives smaller values.

``A_i`` belongs to class-incremental learning: the accuracy in percent of the model after learning
task ``i`` over all test images of tasks 1 to ``i`` together, each classified among the classes of
all these tasks (one head). Its mean over ``i`` is the average incremental accuracy of iCaRL
(Rebuffi et al., CVPR 2017). ZSCL reports that mean and ``A_T`` as Avg and Last.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mulki.errors import InputError, nearest
from mulki.files import read_csv, write_atomic

FloatArray = npt.NDArray[np.float64]

#: Name of the row of the model before any task was learned.
ZERO_SHOT = "zero-shot"

#: Names in ``results.jsonl`` of how far a model has moved, see :mod:`mulki.train.drift`.
WORD_AGREEMENT, MEAN_DISTANCE = "word_agreement", "mean_distance"
#: Name in ``results.jsonl`` of an accuracy A_i, and of the data set it is measured on.
ACC1_SEEN = "acc1_seen"
#: The same with the head of class statistics.
ACC1_SEEN_HEAD = "acc1_seen_head"
ALL_SEEN = "all-seen"

#: Header of the first column of ``matrix.csv``.
AFTER_TASK = "after_task"

#: What the letters in the definitions stand for.
NOTATION = "a[i,j] is the accuracy of task j after task i was learned, and T is the number of tasks"
#: One line per metric, stored beside every result.
DEFINITIONS: dict[str, str] = {
    "transfer": "mean over j >= 2 of the mean over i < j of a[i,j]: tasks not learned yet (ZSCL)",
    "average": "mean of all T*T entries a[i,j] (ZSCL)",
    "last": "mean over j of a[T,j]: every task after the last one was learned (ZSCL)",
    "forgetting": "1/(T-1) sum over j < T of (max over i in j..T-1 of a[i,j]) - a[T,j]; "
    "negative where the last model is the best (Chaudhry et al.)",
    "bwt": "1/(T-1) sum over j < T of a[T,j] - a[j,j] (Lopez-Paz and Ranzato; GIFT's Forget)",
    "cil_average": "mean over i of A_i, the accuracy after task i over all test images of tasks "
    "1..i, classified among the classes of all these tasks (iCaRL's average incremental accuracy)",
    "cil_last": "A_T: all test images, among all classes, after the last task (ZSCL)",
}
#: Metrics with the head of class statistics, and those of texts alone that they stand beside.
HEAD_METRICS: dict[str, str] = {
    f"head_{name}": name for name in ("average", "last", "forgetting", "cil_average", "cil_last")
}
DEFINITIONS |= {
    name: f"as {of}, with the head of class statistics beside the texts (mulki.clip.head)"
    for name, of in HEAD_METRICS.items()
}


@dataclass(frozen=True)
class Metrics:
    """The five metrics, in the unit of the matrix (percent).

    ``transfer``, ``forgetting`` and ``bwt`` are ``None`` with fewer than two learned tasks,
    where they are undefined; all are ``None`` when nothing was learned.
    """

    transfer: float | None = None
    average: float | None = None
    last: float | None = None
    forgetting: float | None = None
    bwt: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Return the metrics keyed ``transfer, average, last, forgetting, bwt``, in that order."""
        return asdict(self)


def _square(a: npt.ArrayLike) -> FloatArray:
    try:
        array = np.asarray(a, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"accuracy matrix: {error}; pass a [T, T] array of numbers") from None
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise InputError(
            f"accuracy matrix: got shape {list(array.shape)}, wanted [T, T] with T >= 1; "
            "keep the learned tasks' rows and columns only, in the order learned"
        )
    if not np.isfinite(array).all():
        i, j = np.argwhere(~np.isfinite(array))[0]
        raise InputError(
            f"accuracy matrix: got {array[i, j]} in entry [{i}, {j}], wanted a finite number; "
            "evaluate that task again or leave its row out"
        )
    return array


def compute_metrics(a: npt.ArrayLike) -> Metrics:
    """Return all `Metrics` of ``a`` ``[T, T]`` (row: after task i, column: task j).

    `DEFINITIONS` has their formulas and sources. Raises `InputError` for a matrix that is not
    square, empty or not finite.
    """
    return Metrics(**{name: float(value) for name, value in stacked_metrics(_square(a)).items()})


def stacked_metrics(a: FloatArray) -> dict[str, FloatArray]:
    """Return each metric of many matrices ``a`` ``[..., T, T]``, as ``[...]``, by its name.

    Those that are undefined for T = 1 are left out there.
    """
    end = a.shape[-1] - 1
    found = {"average": a.mean(axis=(-2, -1)), "last": a[..., end, :].mean(axis=-1)}
    if not end:
        return found
    transfer = [a[..., :j, j].mean(axis=-1) for j in range(1, end + 1)]
    forgetting = [a[..., j:end, j].max(axis=-1) - a[..., end, j] for j in range(end)]
    bwt = [a[..., end, j] - a[..., j, j] for j in range(end)]
    return {
        "transfer": np.mean(transfer, axis=0),
        **found,
        "forgetting": np.mean(forgetting, axis=0),
        "bwt": np.mean(bwt, axis=0),
    }


@dataclass(frozen=True)
class ClassIncremental:
    """Accuracies over all classes seen so far, see the module's docstring.

    ``after`` maps each learned task, in the order learned, to A_i in percent. Raises
    `InputError` for a value that is no percentage.
    """

    after: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, value in self.after.items():
            if not 0.0 <= value <= 100.0:
                raise InputError(
                    f'classes seen after "{name}": got {value}, wanted a percentage from 0 '
                    "to 100; evaluate again or correct it"
                )

    @property
    def average(self) -> float | None:
        """Mean of A_i over the learned tasks, in percent (iCaRL); ``None`` without one."""
        return float(np.mean(list(self.after.values()))) if self.after else None

    @property
    def last(self) -> float | None:
        """A_T, in percent; ``None`` without a learned task."""
        return list(self.after.values())[-1] if self.after else None

    def to_dict(self) -> dict[str, object]:
        """Return ``after``, ``average`` and ``last``, as ``summary.json`` holds them."""
        return {"after": dict(self.after), "average": self.average, "last": self.last}

    def metrics(self) -> dict[str, float | None]:
        """``average`` and ``last`` as ``cil_average`` and ``cil_last``, see `DEFINITIONS`."""
        return {"cil_average": self.average, "cil_last": self.last}


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracies in percent of a run that is under way or complete.

    ``columns`` are the evaluated data sets, in any order; ``tasks`` those learned so far, in
    the order learned; ``rows`` ``[len(tasks), len(columns)]``, one per learned task;
    ``zero_shot`` ``[len(columns)]``, the model before the first task, if it was evaluated.

    Metrics are computed on the learned tasks only: a column that was never learned (a task
    still planned, a data set that is only evaluated) is reported and counts in none of them. So
    a run stopped after k of T tasks has the metrics of a complete run of its first k.

    Raises `InputError` for names that are empty or repeated, tasks without a column, row
    lengths that do not fit and values outside 0..100.
    """

    columns: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    rows: tuple[tuple[float, ...], ...] = ()
    zero_shot: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_names(self.columns, "columns")
        _check_names(self.tasks, "tasks")
        if ZERO_SHOT in self.columns:
            raise InputError(
                f'columns: "{ZERO_SHOT}" names the row before the first task; '
                "give the task another name"
            )
        for task in self.tasks:
            if task not in self.columns:
                raise InputError(
                    f'tasks: "{task}" has no column{nearest(task, self.columns)}; every learned '
                    "task must be evaluated: add its column, or correct the name"
                )
        if len(self.rows) != len(self.tasks):
            raise InputError(
                f"rows: got {len(self.rows)} for {len(self.tasks)} learned tasks; "
                "pass one row per learned task"
            )
        for name, row in self.named_rows():
            if len(row) != len(self.columns):
                raise InputError(
                    f'row "{name}": got {len(row)} values for {len(self.columns)} columns; '
                    "pass one per data set"
                )
            for column, value in zip(self.columns, row, strict=True):
                # Also false for NaN.
                if not 0.0 <= value <= 100.0:
                    raise InputError(
                        f'row "{name}", column "{column}": got {value}, wanted a percentage from 0 '
                        "to 100; evaluate again or correct it"
                    )

    def named_rows(self) -> list[tuple[str, tuple[float, ...]]]:
        """Return name and accuracies of each row, the zero-shot one first if it is there."""
        first = [] if self.zero_shot is None else [(ZERO_SHOT, self.zero_shot)]
        return [*first, *zip(self.tasks, self.rows, strict=True)]

    def with_row(self, after_task: str, accuracies: Mapping[str, float]) -> AccuracyMatrix:
        """Return this matrix with one more row; ``accuracies`` maps each column to its percent.

        ``after_task`` is the task just learned, or :data:`ZERO_SHOT`, which can be set once and
        before the first task. Raises `InputError` for data sets that are missing, unknown
        or repeated, and as the class does.
        """
        for name in accuracies:
            if name not in self.columns:
                raise InputError(
                    f'row "{after_task}": data set "{name}" is not a column'
                    f"{nearest(name, self.columns)}; the columns are {', '.join(self.columns)}"
                )
        missing = [column for column in self.columns if column not in accuracies]
        if missing:
            raise InputError(
                f'row "{after_task}": no accuracy for {", ".join(missing)}; '
                "evaluate every data set before adding the row"
            )
        values = tuple(float(accuracies[column]) for column in self.columns)
        if after_task != ZERO_SHOT:
            return replace(self, tasks=(*self.tasks, after_task), rows=(*self.rows, values))
        if self.zero_shot is not None or self.tasks:
            raise InputError(
                f'row "{ZERO_SHOT}": it came twice or after a learned task; '
                "evaluate the start model once, first"
            )
        return replace(self, zero_shot=values)

    def square(self) -> FloatArray:
        """Return ``[k, k]``, the rows and columns of the k learned tasks in the order learned."""
        index = [self.columns.index(task) for task in self.tasks]
        return np.asarray(self.rows, dtype=np.float64).reshape(-1, len(self.columns))[:, index]

    def metrics(self) -> Metrics:
        """Return the metrics over the learned tasks; all ``None`` when none was learned."""
        return compute_metrics(self.square()) if self.tasks else Metrics()

    def zero_shot_metrics(self) -> Metrics | None:
        """Return what a model that never changed would score, or ``None`` without that row.

        A run whose Transfer is below this one's has lost zero-shot ability.
        """
        if self.zero_shot is None or not self.tasks:
            return None
        row = [self.zero_shot[self.columns.index(task)] for task in self.tasks]
        return compute_metrics(np.tile(row, (len(row), 1)))


def _check_names(names: Sequence[str], what: str) -> None:
    for position, name in enumerate(names):
        # Such a name cannot be written to a file, or into a message of one line, and read back.
        if not name or name != name.strip() or not name.isprintable():
            raise InputError(
                f"{what}: got {name!r}, wanted a printable name without outer spaces; rename it"
            )
        if name in names[:position]:
            raise InputError(f'{what}: "{name}" came twice; keep one of them')


def read_matrix(path: str | os.PathLike[str]) -> AccuracyMatrix:
    """Read a ``matrix.csv``: header ``after_task`` and a column per data set, in percent.

    The rows are, from the top, an optional ``zero-shot`` and one per learned task in the order
    learned, named as the task's column is. A byte-order mark and blank lines are accepted, so
    spreadsheets can write the file.

    Raises `InputError`, with file, line and column, for a file that is missing, not
    comma-separated text or empty, a first column that is not ``after_task``, rows that are
    unknown, repeated, out of place or of another length, and cells that are no number in 0..100.
    """
    path = Path(path)
    lines = read_csv(path, "the matrix.csv of a run")
    (header, (first, *columns)), *body = lines
    if first != AFTER_TASK:
        raise InputError(
            f'{path}, line {header}: got "{first[:60]}" as the first column, wanted '
            f'"{AFTER_TASK}"; name the column so, and separate columns by commas'
        )
    if not columns:
        raise InputError(f"{path}, line {header}: no data set columns; add one per data set")
    try:
        matrix = AccuracyMatrix(columns=tuple(columns))
    except InputError as error:
        raise InputError(f"{path}, line {header}: {error}") from None
    if not body:
        raise InputError(f"{path}: has a header and no rows; add a row per learned task")

    for number, (name, *cells) in body:
        where = f"{path}, line {number}"
        if name != ZERO_SHOT and name not in columns:
            raise InputError(
                f'{where}: unknown row "{name}"{nearest(name, [ZERO_SHOT, *columns])}; a row is '
                f'"{ZERO_SHOT}" or named as the column of the task learned: {", ".join(columns)}'
            )
        if len(cells) != len(columns):
            raise InputError(
                f"{where}: got {len(cells)} values, wanted {len(columns)}; "
                "give each data set one value"
            )
        values = {
            column: _cell(cell, f'{where}, column "{column}"')
            for column, cell in zip(columns, cells, strict=True)
        }
        try:
            matrix = matrix.with_row(name, values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return matrix


_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _cell(text: str, where: str) -> float:
    # Not all that Python's float takes: 1_0 would be ten.
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not 0.0 <= value <= 100.0:
        came = f'"{text}"' if text else "an empty cell"
        raise InputError(
            f"{where}: got {came}, wanted a percentage from 0 to 100; "
            "write a plain number such as 63.25"
        )
    return value


def write_matrix(path: str | os.PathLike[str], matrix: AccuracyMatrix) -> None:
    """Write ``matrix`` to ``path`` as `read_matrix` reads it, in one atomic step.

    Four decimals distinguish all accuracies on up to half a million test images.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([AFTER_TASK, *matrix.columns])
    for name, row in matrix.named_rows():
        writer.writerow([name, *(f"{value:.4f}" for value in row)])
    write_atomic(path, buffer.getvalue())
