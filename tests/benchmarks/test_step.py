"""The benchmark of a training step: both loops compute the same, and what is counted."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.step import __main__ as command
from benchmarks.step import plain
from benchmarks.step.job import Job, WithCaptions, prepare
from benchmarks.step.loop_cost import compare
from benchmarks.step.stopwatch import PARTS, Stopwatch
from benchmarks.tables import markdown, write_csv
from mulki.clip.features import Features
from mulki.errors import InputError
from mulki.methods import TaskStart
from mulki.methods.mulki import MulKI
from mulki.train.config.presets import RELATIONS
from tests import train_helpers

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model


@pytest.fixture
def options(start_model: dict[str, str]) -> dict[str, Any]:
    return {
        "task": "digits",
        "captions": 5,
        "rounds": 1,
        "lock_text": None,
        "model": start_model["model"],
        "batch_size": 8,
        "precision": "fp32",
        "device": "cpu",
    }


@pytest.mark.parametrize("captions", [0, 5])
def test_both_objectives_are_the_same(captions: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> torch.Tensor:
        drawn = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        return F.normalize(drawn, dim=1)

    def model(scale: float) -> Features:
        return Features(rows(7), rows(4), torch.tensor(scale, dtype=torch.float64), rows(4))

    # A class without an image, and coefficients that differ, so that none stands for another.
    target = torch.tensor([0, 1, 1, 2, 2, 2, 0])
    different = {"image_text": 0.3, "image_image": 0.5, "text_image": 0.7, "text_text": 0.9}
    o = MulKI.Options(**RELATIONS | different | {"gate": "label", "alignment": 0.2})
    teachers = [model(9.0), model(5.0)]
    sentences = rows(captions)
    student = model(7.0)
    inputs = [student.images.requires_grad_(), student.texts.requires_grad_()]
    method = WithCaptions(o, sentences, teachers[0].scale)
    method.start_task(TaskStart(1, 4, 1, {}, student.prototypes))
    terms = method.losses(student, tuple(teachers), target)
    assert ("caption_loss" in terms) == bool(captions)
    ours = torch.stack(list(terms.values())).sum()
    theirs = plain.objective(student, teachers, sentences if captions else None, target, o)
    torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=0)
    for a, b in zip(
        torch.autograd.grad(theirs, inputs), torch.autograd.grad(ours, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_laps_add_up_and_stop() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    features = torch.randn(3, requires_grad=True) * 1.0
    watch.lap("forward")
    loss = watch.end_loss_at(features).square().sum()
    watch.lap("loss")
    before = watch.parts["loss"]
    loss.backward(retain_graph=True)
    after = watch.parts["loss"]
    assert after > before, "the loss's share of the backward pass is missing"
    loss.backward()
    assert watch.parts["loss"] == after, "a second gradient is not the end of a loss"
    total = watch.stop()
    assert sum(watch.parts.values()) == pytest.approx(total)
    watch.lap("data")
    assert watch.parts["data"] == 0


def test_both_loops_take_the_same_steps(options: dict[str, Any]) -> None:
    job = prepare(**options)
    plain_row, our_row = compare(job, 1)
    for row in (plain_row, our_row):
        assert sum(row[f"{part}_share"] for part in PARTS) == pytest.approx(1)
        assert row["images_per_second"] > 0
    assert our_row["images_per_second"] * our_row["ms"] == pytest.approx(8000)
    assert plain_row["teachers_share"] > our_row["teachers_share"]
    assert our_row["speedup"] > 0


def test_a_task_smaller_than_a_batch_counts_its_images(options: dict[str, Any]) -> None:
    job = prepare(**options | {"batch_size": 32, "limit_images": 20})
    _, row = compare(job, 1)
    assert row["images_per_second"] * row["ms"] == pytest.approx(1000 * len(job.task.train))


def test_loops_with_other_losses_are_refused(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plain.objective
    monkeypatch.setattr(plain, "objective", lambda *a: real(*a) * 1.01)
    with pytest.raises(InputError, match="losses"):
        compare(prepare(**options), 1)


def test_teachers_are_two_models_and_the_student_trains_what_the_start_model_does(
    options: dict[str, Any],
) -> None:
    job: Job = prepare(**options | {"lock_text": True})
    weights = [next(iter(t.clip.visual.parameters())) for t in job.teachers]
    assert not torch.equal(*weights)
    one, other = job.student(), job.student()
    assert one.trainable().keys() == job.start.trainable().keys()
    assert all(name.startswith("visual.") for name in one.trainable())
    name = next(iter(one.trainable()))
    assert one.trainable()[name] is not other.trainable()[name]


def test_the_command(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.csv"
    arguments = ["--model", options["model"], "--task", "digits", "--batch-size", "8"]
    command.main([*arguments, "--rounds", "1", "--augment", "crop", "--output", str(path)])
    printed = capsys.readouterr().out
    assert "loss of the first step" in printed and "augment crop" in printed
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["loop"] for r in rows] == ["plain", "mulki"]
    assert rows[0]["torch_version"] == torch.__version__ and rows[0]["task"] == "digits"
    with pytest.raises(InputError, match="--task: got 'digit'.*digits"):
        command.main(["--task", "digit"])


def test_tables(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": 1.234}, {"a": "y", "b": None}]
    assert markdown(rows, {"a": "name", "b": "value:.1f"}).splitlines() == [
        "| name | value |",
        "| --- | ---: |",
        "| x | 1.2 |",
        "| y | - |",
    ]
    path = tmp_path / "t.csv"
    write_csv(path, rows, "cpu")
    write_csv(path, rows, "cpu")
    assert len(path.read_text().splitlines()) == 5
    with pytest.raises(InputError, match="columns"):
        write_csv(path, [{"c": 1}], "cpu")
    with pytest.raises(TypeError, match="threads"):
        write_csv(path, [{"threads": 1}], "cpu")
    with pytest.raises(InputError, match="folder"):
        write_csv(tmp_path / "no" / "t.csv", rows, "cpu")
