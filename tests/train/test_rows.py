from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from torch import nn

from mulki.clip.models import VisionLanguageModel
from mulki.runs.metrics import read_matrix
from mulki.runs.predictions import figures
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
        _, *rows = csv.reader(file)
    assert len({tuple(row[1:]) for row in rows}) == 1
    # The test images, and for the class statistics the training images.
    assert sum(seen) == 25 + 30


def test_tests_alone_compute_in_the_precision_that_was_asked_for(
    run: Run, task_folders: tuple[str, str]
) -> None:
    seen: set[tuple[bool, bool]] = set()

    def look(module: nn.Module, given: Any) -> None:
        if isinstance(module, nn.LayerNorm):
            seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        half = {"precision_eval": "amp_bf16"}
        folder = run(method="finetune", lr=3e-3, head=False, val_fraction=0.2, **half)
        assert seen == {(True, False), (False, True)}
        # So do those of the checkpoint, and its predictions.
        seen.clear()
        rows = [figures([of.own])["acc1"] for of in evaluation(folder.path, {}).predictions()]
        assert rows == pytest.approx(read_matrix(folder.path / "matrix.csv").rows[-1])
        of_half = load(folder.path).encode_images(task_folders[0])
        assert seen == {(False, True)}
    finally:
        hook.remove()
    full = load(folder.path, precision_eval="fp32").encode_images(task_folders[0])
    assert of_half.dtype == full.dtype and 1e-5 < (of_half - full).abs().max() < 0.1
