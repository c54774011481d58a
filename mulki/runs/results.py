"""``results.jsonl`` of a run: a line for each evaluation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mulki.errors import InputError
from mulki.files import check_regular, from_json
from mulki.runs.metrics import ACC1_SEEN, ClassIncremental


@dataclass(frozen=True)
class Evaluation:
    """One line of ``results.jsonl``: one model evaluated on one data set.

    ``step`` counts optimisation steps since the start of the sequence (0 for zero-shot),
    ``after_task`` is the last task learned or ``zero-shot``, ``value`` is in percent for
    ``acc1``, ``n`` the number of test images, ``seconds`` how long the evaluation took.

    A data set of captions has four lines in place of ``acc1``, see
    :class:`mulki.runs.answers.Ranks`, of which ``image_to_text_R@1`` stands in the matrix; each has
    the seconds of all. For ``text_to_image_R@1`` and ``_R@5``, ``n`` is the number of distinct
    captions.

    With the metric ``acc1_seen`` and the data set ``all-seen``, the value is A_i of
    :class:`mulki.runs.metrics.ClassIncremental`. It comes from the same predictions as the lines of
    the learned tasks, whose seconds it sums. ``acc1_head`` and ``acc1_seen_head`` are the same with
    the head of class statistics, see :mod:`mulki.clip.head`. ``word_agreement`` (in percent) and
    ``mean_distance`` are those of :mod:`mulki.train.drift`, each with the seconds of all. Lines of
    earlier versions lack ``method`` and ``model``.
    """

    run: str
    order: str
    seed: int
    step: int
    after_task: str
    eval_dataset: str
    metric: str
    value: float
    n: int
    seconds: float
    method: str = ""
    model: str = ""


def read_evaluations(path: str | os.PathLike[str]) -> list[Evaluation]:
    """Read a ``results.jsonl``; a last line that was cut off by a crash is left out.

    Raises :class:`InputError` for a missing file and for any other line that is not an
    :class:`Evaluation`, with its number.
    """
    path = Path(path)
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; pass the results.jsonl of a run") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; restore the file") from None
    *lines, _cut_off = text.split("\n")
    evaluations = []
    for number, line in enumerate(lines, start=1):
        try:
            evaluations.append(Evaluation(**from_json(line)))
            _check_kinds(evaluations[-1])
        except (ValueError, TypeError, OverflowError):
            names = ", ".join(field.name for field in fields(Evaluation))
            raise InputError(
                f"{path}, line {number}: not an evaluation, wanted a JSON object with "
                f"{names}; remove the line or restore the file"
            ) from None
    return evaluations


def class_incremental(lines: Iterable[Evaluation], tasks: Sequence[str]) -> ClassIncremental:
    """The accuracies over all classes seen after each of these learned tasks that has a line."""
    seen = {line.after_task: round(line.value, 4) for line in lines if line.metric == ACC1_SEEN}
    return ClassIncremental({task: seen[task] for task in tasks if task in seen})


def _check_kinds(evaluation: Evaluation) -> None:
    # Text where text was wanted, else a number that is finite.
    for item in fields(Evaluation):
        value = getattr(evaluation, item.name)
        if not (isinstance(value, str) if item.type == "str" else math.isfinite(value)):
            raise TypeError(item.name)
