from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from mulki.clip.models import VisionLanguageModel
from mulki.runs.metrics import read_matrix
from mulki.runs.predictions import figures
from mulki.train import rows
from mulki.train.drift import Drift
from mulki.train.model import load
from mulki.train.retest import evaluation
from tests.train.run_helpers import Run


def test_training_is_seen_in_the_matrix(run: Run) -> None:
    folder = run(method="finetune", iterations=30, lr=5e-3)
    assert folder.matrix.rows[0][0] > max(60.0, folder.matrix.zero_shot[0])  # type: ignore[index]


def test_rows_of_zero_shot_are_the_same_and_evaluated_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = VisionLanguageModel.encode_images

    def counted(model: VisionLanguageModel, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return real(model, images)

    monkeypatch.setattr(VisionLanguageModel, "encode_images", counted)
    folder = run(method="zero_shot")
    with (folder.path / "matrix.csv").open(newline="", encoding="utf-8") as file:
        _, *lines = csv.reader(file)
    assert len({tuple(line[1:]) for line in lines}) == 1
    # The test images, and for the class statistics the training images.
    assert sum(seen) == 25 + 30


@pytest.fixture
def seen() -> Iterator[set[tuple[bool, bool]]]:
    """Whether there were gradients, and autocast, whenever a tower ran."""
    found: set[tuple[bool, bool]] = set()

    def look(module: nn.Module, given: Any) -> None:
        if isinstance(module, nn.LayerNorm):
            found.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    yield found
    hook.remove()


HALF = {"precision_eval": "amp_bf16"}


def test_tests_alone_compute_in_the_precision_that_was_asked_for(
    run: Run, seen: set[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(method="finetune", head=False, val_fraction=0.2, **HALF)
    assert seen == {(True, False), (False, True)}
    drift = Mock(wraps=Drift)
    monkeypatch.setattr(rows, "Drift", drift)
    run(method="mulki", name="with-its-original", **HALF)
    for model in drift.call_args.args[:2]:
        with model.autocast():
            assert torch.is_autocast_enabled("cpu")


def test_a_checkpoint_is_tested_and_predicts_as_its_run_was_tested(
    run: Run, seen: set[tuple[bool, bool]], task_folders: tuple[str, str]
) -> None:
    # What is frozen of the text tower is no exception.
    folder = run(method="finetune", lr=3e-3, lock_text=True, **HALF)
    seen.clear()
    found = [figures([of.own])["acc1"] for of in evaluation(folder.path, {}).predictions()]
    assert found == pytest.approx(read_matrix(folder.path / "matrix.csv").rows[-1])
    model = load(folder.path)
    model.predict(task_folders[0])
    half = model.encode_images(task_folders[0])
    assert seen == {(False, True)}
    full = load(folder.path, precision_eval="fp32").encode_images(task_folders[0])
    assert half.dtype == full.dtype and 1e-5 < (half - full).abs().max() < 0.1
