from __future__ import annotations

import csv

import pytest
import torch

from mulki.clip.models import VisionLanguageModel
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
