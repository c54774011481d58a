from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.embedded import bounds
from mulki.data import Task
from mulki.train.config.run_config import resolve
from tests import train_helpers

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model
task_folders = train_helpers.task_folders
tasks = train_helpers.tasks


def test_one_task_of_all(tasks: list[Task]) -> None:
    joint = bounds.joint(tasks)
    first, second = tasks
    assert len(joint.classes) == len(first.classes) + len(second.classes)
    assert [p for (p,) in joint.prompts()] == [of[0] for task in tasks for of in task.prompts()]
    count = len(first.train)
    assert len(joint.train) == count + len(second.train)
    assert list(joint.train.targets[:count]) == list(first.train.targets)
    shifted = [target - len(first.classes) for target in joint.train.targets[count:]]
    assert shifted == list(second.train.targets)
    for index, of, place in ((0, first, 0), (count + 1, second, 1)):
        assert joint.train.name(index) == of.train.name(place)
        pictures = joint.train.load(index), of.train.load(place)
        assert np.array_equal(*map(np.asarray, pictures))


def test_bounds_are_of_runs(
    tasks: list[Task], start_model: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = {**start_model, "batch_size": 6, "lr": 1e-2, "device": "cpu", "iterations": 2}
    monkeypatch.setattr(bounds, "SHARED", shared)
    steps: list[int] = []

    def resolved(given: dict[str, Any]) -> Any:
        settings = resolve(given)
        steps.append(settings.run.iterations)
        return settings

    monkeypatch.setattr(bounds, "resolve", resolved)
    with train_helpers.without_figures():
        lines = [bounds.bound(kind, 0, tasks) for kind in ("joint", "alone")]
    assert steps == [2, 4, 2, 2, 2]
    for line in lines:
        assert list(line["accuracies"]) == [task.name for task in tasks]
        assert all(0 <= value <= 100 for value in line["accuracies"].values())
    file = tmp_path / "bounds.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in [*lines, {"pack": "other"}]))
    assert bounds.read_lines(file) == lines
    last = [
        *lines,
        {**lines[0], "seed": 1, "accuracies": dict.fromkeys(lines[0]["accuracies"], 50)},
    ]
    joint, alone = bounds.table(last).splitlines()[2:]
    assert joint.startswith("| joint | ") and joint.endswith(" | 2 |") and "±" in joint
    assert alone.startswith("| alone | ") and alone.endswith(" | 1 |") and "±" not in alone
