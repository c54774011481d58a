from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mulki.methods.mulki import MulKI
from mulki.runs.folder import RunFolder
from mulki.runs.history import BINS, read_history
from tests.runs.tracker_files import tensorboard_curves, wandb_curves
from tests.train.run_helpers import Run


def test_a_run_records_its_logged_steps(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    curves: list[tuple[Mapping[str, float], int, str]] = []
    real = RunFolder.scalars

    def spied(self: RunFolder, values: Mapping[str, float], step: int, axis: str = "step") -> None:
        curves.append((values, step, axis))
        real(self, values, step, axis)

    monkeypatch.setattr(RunFolder, "scalars", spied)
    folder = run(method="mulki", gate="uniform", iterations=5)
    records = read_history(folder.path)
    assert [(r.task, r.index, r.step, r.steps, r.total) for r in records] == [
        (name, index, step, 5, 5 * index + step)
        for index, name in enumerate(("colours", "shades"))
        for step in (1, 2, 4, 5)
    ]
    for record in records:
        assert set(record.seconds) == {"loading", "gradients", "update", "rest"}
        assert all(0 <= seconds < 60 for seconds in record.seconds.values())
        assert record.seconds["gradients"] > 0 and record.images_per_second > 0
        assert list(record.teacher_weights) == ["zero_shot", "previous"]
        assert [sum(counts) for counts in record.teacher_weights.values()] == [6, 6]
        assert 0 <= record.prototype_drift["mean"] <= record.prototype_drift["max"] < 1
        assert record.memory_mib is None or record.memory_mib > 10
        assert (record.prepared is not None) == (record.step == 1)
    # By this gate each counts half.
    assert records[0].teacher_weights["previous"][BINS // 2] == 6
    assert records[2].prototype_drift["max"] > 0

    train = [(values, step) for values, step, _ in curves if "train/loss" in values]
    assert [step for _, step in train] == [r.total for r in records]
    values = train[-1][0]
    assert values["train/loss"] == pytest.approx(sum(records[-1].losses.values()))
    assert {"train/lr", "train/samples_per_second", "train/samples_per_second_per_gpu"} <= {*values}
    assert {"train/data_time", "train/batch_time", "train/ce_loss"} <= {*values}
    assert {"teachers/zero_shot", "teachers/previous", "prototype_drift/mean"} <= {*values}
    tested = [values for values, *_ in curves if "colours/acc1" in values]
    assert len(tested) == 3
    for each in tested:
        assert each["val/colours-zeroshot-val-top1"] == each["colours/acc1"] / 100
    assert [step for values, step, axis in curves if axis == "tasks"] == [1, 2]


def test_only_logged_steps_are_watched(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = MulKI.watched

    def counted(self: MulKI) -> dict[str, torch.Tensor]:
        calls.append(self)
        return real(self)

    monkeypatch.setattr(MulKI, "watched", counted)
    run(method="mulki", iterations=9, log_every_n_steps=4)
    assert len(calls) == 2 * 4  # steps 1, 4, 8 and 9 of two tasks


def test_a_short_task_has_more_points(run: Run) -> None:
    folder = run(method="finetune", iterations=45, log_every_n_steps=None)
    steps = [record.step for record in read_history(folder.path) if record.index == 0]
    assert steps == [1, *range(2, 45, 2), 45]


def test_a_method_without_teachers_has_none_of_their_numbers(run: Run) -> None:
    folder = run(method="finetune")
    for record in read_history(folder.path):
        assert record.teacher_weights == {} and record.prototype_drift == {}
    assert re.search(r"colours step 4: ce \d+\.\d{3}, lr", (folder.path / "out.log").read_text())


def test_tensorboard_and_wandb_find_the_curves_of_a_run(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "wandb"):
        pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run(method="mulki", report_to=["tensorboard", "wandb"])
    curves = tensorboard_curves(folder.path / "tensorboard")
    of_open_clip = {"loss", "lr", "samples_per_second", "data_time", "batch_time"}
    assert {f"train/{name}" for name in of_open_clip} <= {*curves}
    assert {"val/colours-zeroshot-val-top1", "colours/acc1", "metrics/last"} <= {*curves}
    assert {"teachers/previous", "prototype_drift/mean"} <= {*curves}
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 4, 5, 6, 8]
    assert [step for step, _ in curves["colours/acc1"]] == [0, 4, 8]
    assert curves["metrics/last"] == [
        (1, pytest.approx(folder.matrix.rows[0][0], rel=1e-6)),
        (2, pytest.approx(folder.matrix.metrics().last, rel=1e-6)),
    ]
    rows = wandb_curves(folder.path / "wandb")
    for name, points in curves.items():
        axis = "tasks" if name.startswith("metrics/") else "step"
        found = [(row[axis], row[name]) for row in rows if name in row]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name
