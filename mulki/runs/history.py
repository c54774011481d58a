"""What the steps of a run were: ``history.jsonl``, a line for each step that is logged.

A run that goes on after a stop writes some steps again; the later line of a step counts. A line
that was cut off by a crash is left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from mulki.files import append_lines, from_json

#: The file in a run folder.
FILE = "history.jsonl"
#: Bins of equal width over [0, 1] of a teacher's weights.
BINS = 20


@dataclass(frozen=True)
class StepRecord:
    """One step, and what was measured since the one before it in the file.

    Args:
        task: its name.
        index: of the task, from 0.
        step: of the task, from 1.
        steps: of the task, in all.
        total: steps since the start of the sequence.
        losses: the terms of the objective by name.
        lr: the learning rate.
        images_per_second: of all processes, loading included.
        seconds: of a step by part, the mean since the line before.
        memory_mib: the largest memory in use so far; None where that is not known.
        teacher_weights: of each teacher by name, how many samples of the batch gave it a weight in
            each of `BINS` bins.
        prototype_drift: mean and largest cosine distance of the student's prototypes from those at
            the task's start.
        prepared: seconds before the first step of the task, in which its teachers were prepared.
    """

    task: str
    index: int
    step: int
    steps: int
    total: int
    losses: dict[str, float]
    lr: float
    images_per_second: float
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mib: float | None = None
    teacher_weights: dict[str, list[int]] = field(default_factory=dict)
    prototype_drift: dict[str, float] = field(default_factory=dict)
    prepared: float | None = None


_NUMBERS = ("index", "step", "steps", "total", "lr", "images_per_second")
_TABLES = ("losses", "seconds", "prototype_drift")


def add_step(folder: Path, record: StepRecord) -> None:
    """Append a line to the file of a run folder."""
    append_lines(folder / FILE, json.dumps(asdict(record)) + "\n")


def read_history(folder: str | os.PathLike[str]) -> list[StepRecord]:
    """The logged steps of a run in their order; none where the file is missing."""
    path = Path(folder) / FILE
    if not path.is_file():
        return []
    found: dict[tuple[int, int], StepRecord] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _record(line)
        if record is not None:
            found[record.index, record.step] = record
    return [found[key] for key in sorted(found)]


def mean_seconds(history: Sequence[StepRecord]) -> dict[str, float]:
    """Mean seconds of a step by part over records of one task; empty where none has them.

    A record counts as often as there are steps since the one before it.
    """
    before = [0, *(record.step for record in history)]
    timed = [
        (max(record.step - last, 1), record.seconds)  # at least 1 in a damaged file too
        for last, record in zip(before, history, strict=False)
        if record.seconds
    ]
    steps = sum(number for number, _ in timed)
    names = dict.fromkeys(name for _, seconds in timed for name in seconds)
    return {
        name: sum(number * seconds.get(name, 0.0) for number, seconds in timed) / steps
        for name in names
    }


def _record(line: str) -> StepRecord | None:
    # None for a line that was cut off, or changed by hand or by a disk.
    try:
        given = from_json(line)
        known = {item.name for item in fields(StepRecord)}
        record = StepRecord(**{k: v for k, v in given.items() if k in known})
        tables = [getattr(record, name) for name in _TABLES]
        numbers = [getattr(record, name) for name in _NUMBERS]
        numbers += [value for table in tables for value in table.values()]
        numbers += [count for of in record.teacher_weights.values() for count in of]
        numbers += [x for x in (record.memory_mib, record.prepared) if x is not None]
        whole = all(map(math.isfinite, numbers)) and isinstance(record.task, str)
        whole &= all(len(of) == BINS for of in record.teacher_weights.values())
    except (ValueError, TypeError, AttributeError, OverflowError):
        return None
    return record if whole else None
