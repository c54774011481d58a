"""All that a run folder holds, as far as it can be read, and what is missing or damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mulki.choices.option_files import options_in
from mulki.errors import InputError
from mulki.files import check_regular
from mulki.runs.answers import FOLDER, Answers, read_answers
from mulki.runs.catalog import EXAMPLES, TASKS, DataSet, Example, read_examples, read_tasks
from mulki.runs.history import FILE as HISTORY
from mulki.runs.history import StepRecord, read_history
from mulki.runs.reading import RunData, read_with
from mulki.runs.results import Evaluation, read_evaluations

T = TypeVar("T")

#: What a report lacks without a file of the folder.
NEEDED_FOR = {
    "matrix.csv": "accuracies and metrics; a run writes it after its first evaluation",
    "summary.json": "status and duration",
    "args.yaml": "model and configuration",
    "env.json": "environment and fingerprint",
    HISTORY: "losses, weights of teachers, drift of prototypes, time and memory",
    "results.jsonl": "time of tests",
    TASKS: "accuracies by class",
    FOLDER: "accuracies by class",
    EXAMPLES: "images that were gained and lost; a run writes it after its first task",
}


@dataclass(frozen=True)
class RunContents:
    """What a run folder holds; what cannot be read is empty, and named in `missing`.

    Args:
        data: as `mulki.report.read_folder` returns it; the matrix may have no rows.
        options: from ``args.yaml``.
        evaluations: from ``results.jsonl``.
        history: from ``history.jsonl``.
        data_sets: from ``tasks.json``, by name.
        answers: from ``answers/``, by row of the matrix and by data set.
        examples: from ``examples.json``.
        missing: a sentence for each file that is missing or damaged.
    """

    data: RunData
    options: dict[str, Any]
    evaluations: list[Evaluation]
    history: list[StepRecord]
    data_sets: dict[str, DataSet]
    answers: dict[str, dict[str, Answers]]
    examples: list[Example]
    missing: tuple[str, ...]

    @property
    def learned_elsewhere(self) -> list[str]:
        """Tasks of an earlier run that this one has gone on from, and that have no row here."""
        before = self.data.environment.get("learned_before")
        named = before if isinstance(before, list) else []
        matrix = self.data.matrix
        return [name for name in matrix.columns if name in named and name not in matrix.tasks]

    @property
    def evaluated(self) -> bool:
        """Whether the matrix has a row."""
        return bool(self.data.matrix.named_rows())


def read_contents(folder: str | os.PathLike[str]) -> RunContents:
    """Read all of a run folder that can be read, of an unfinished or damaged run too.

    Raises:
        InputError: no such folder, or none of a run's files is in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pass the folder of a run")
    missing = [
        f"{name} is not there: no {lacks}"
        for name, lacks in NEEDED_FOR.items()
        if not (folder / name).exists()
    ]
    if len(missing) == len(NEEDED_FOR):
        raise InputError(f"{folder}: no file of a run in it; pass a folder that a run has written")

    def read(name: str, reader: Callable[[Path], T], instead: T) -> T:
        if not (folder / name).exists():
            return instead
        try:
            check_regular(folder / name)
            return reader(folder / name)
        except (OSError, ValueError, RecursionError) as error:  # whatever a damaged file raises
            text = str(error).removeprefix(f"{folder}{os.sep}")
            missing.append(text if name in text else f"{name}: {text}")
            return instead

    data = read_with(read, folder)
    options: dict[str, Any] = {}
    return RunContents(
        data=data,
        options=read("args.yaml", lambda _: _options(data.config), options),
        evaluations=read("results.jsonl", read_evaluations, []),
        history=read(HISTORY, lambda _: read_history(folder), []),
        data_sets=read(TASKS, lambda _: read_tasks(folder), {}),
        answers=read(FOLDER, lambda _: read_answers(folder), {}),
        examples=read(EXAMPLES, lambda _: read_examples(folder), []),
        missing=tuple(dict.fromkeys(missing)),
    )


def _options(config: str) -> dict[str, Any]:
    try:
        return options_in(config)
    except ValueError as error:
        raise InputError(f"args.yaml: not the options of a run ({error})") from None
