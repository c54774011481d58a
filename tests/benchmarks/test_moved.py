from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.embedded import moved
from mulki.clip.head import ClassStatistics, Moments
from mulki.data import Task
from mulki.data.made_images import CHANGES
from mulki.train.learning import training_set
from tests import train_helpers

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model
task_folders = train_helpers.task_folders
tasks = train_helpers.tasks


def statistics(task: Task, features: torch.Tensor) -> ClassStatistics:
    found = Moments(len(task.classes))
    found.add(features, torch.arange(len(features)) % len(task.classes))
    return ClassStatistics().with_task(*found.of(task))


def test_statistics_move_with_the_features(tasks: list[Task]) -> None:
    torch.manual_seed(0)
    before = F.normalize(torch.randn(400, 8), dim=1)
    turned = torch.linalg.qr(torch.randn(8, 8)).Q
    old = statistics(tasks[0], before[:40])
    assert old.scatter is not None

    found = moved.mapped(old, before, before @ turned)
    new = statistics(tasks[0], before[:40] @ turned)
    torch.testing.assert_close(found.tasks[0].means, new.tasks[0].means, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.scatter, new.scatter, rtol=1e-2, atol=5e-3)


def test_a_run_that_moves_its_model(
    tasks: list[Task], start_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {**start_model, "batch_size": 6, "lr": 1e-2, "device": "cpu", "iterations": 4}
    monkeypatch.setattr(moved, "SHARED", shared | {"tasks": tuple("ab")})
    monkeypatch.setattr(moved, "load_tasks", lambda config: tasks)
    monkeypatch.setattr(training_set, "_SAMPLE", 8)
    monkeypatch.setattr(moved, "held_out", lambda task: task)
    with train_helpers.without_figures():
        line = moved.line_of("finetune", "III")
    for task in tasks:
        assert set(line["moved"][task.name]) == {"own", "other tasks", *CHANGES}
        assert all(0 < value <= 2 for value in line["moved"][task.name].values())
        kept = line["kept"][task.name]
        assert set(kept) == {"texts", "kept", "mapped", "shifted", "anew"}
    # Nothing has drifted after the first task, and without a weight the head is the texts.
    first, last = line["kept"].values()
    assert first["kept"] == first["anew"] == first["mapped"] == first["shifted"]
    assert line["grid"]["0.1 0"][1] == last["texts"] and line["grid"]["0.1 0.25"][1] == last["kept"]
    table = moved.tables([line])
    assert "| own |" in table and "| shifted |" in table and "own, 0.25" in table
