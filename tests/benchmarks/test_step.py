"""The benchmark of a training step and of what surrounds it."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import step
from mulki.clip.features import Features
from mulki.errors import InputError
from mulki.methods import TaskStart
from mulki.methods.mulki import MulKI
from mulki.train.config.presets import RELATIONS
from tests import train_helpers

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model


def test_both_objectives_are_the_same() -> None:
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
    student = model(7.0)
    inputs = [student.images.requires_grad_(), student.texts.requires_grad_()]
    method = MulKI(o)
    method.start_task(TaskStart(1, 4, 1, {}, student.prototypes))
    ours = torch.stack(list(method.losses(student, tuple(teachers), target).values())).sum()
    theirs = step.objective(student, teachers, target, o)
    torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=0)
    for a, b in zip(
        torch.autograd.grad(theirs, inputs), torch.autograd.grad(ours, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_command(
    start_model: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "found.csv"
    arguments = ["--model", start_model["model"], "--task", "digits", "--batch-size", "8"]
    arguments += ["--rounds", "1"]
    step.main([*arguments, "--augment", "crop", "--output", str(path)])
    with path.open(newline="") as file:
        plain, ours = csv.DictReader(file)
    assert (plain["loop"], ours["loop"]) == ("plain", "mulki")
    assert float(plain["images_per_second"]) > 0 and float(ours["speedup"]) > 0
    assert ours["task"] == "digits" and ours["torch_version"] == torch.__version__
    with pytest.raises(InputError, match="columns"):
        step.write_csv(path, [{"other": 1}], "cpu")
    real = step.objective
    monkeypatch.setattr(step, "objective", lambda *a: real(*a) * 1.01)
    with pytest.raises(InputError, match="losses of the first step differ"):
        step.main(arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("of", "count"), [(step.FILES, 400), (step.MEMBERS, 800)])
def test_many_images_are_read(of: str, count: int, tmp_path: Path) -> None:
    row = step.growth(of, count, tmp_path)
    assert row["count"] == count and row["cpu"] > 0 and row["memory"] is not None


@pytest.mark.slow
def test_a_measured_step_is_near_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without texts that train or words, which take most of the time.
    short = {"lock_text": True, "anchors": "none", "image_anchor": 0.0, "grad_checkpointing": True}
    monkeypatch.setattr(step, "FORMS", {"short": short})
    monkeypatch.setattr(step, "BATCHES", (16,))
    monkeypatch.setattr(step, "MODELS", {"ViT-S-32": {"short": (16,)}})
    monkeypatch.setattr(step, "_alone", lambda call, *given: call(*given))
    (row,) = step.large(["ViT-S-32"], None)
    assert row["images"] == 16 and row["on_80"] == 16
    assert 0.6 < row["counted"] / row["measured"] < 1.1
