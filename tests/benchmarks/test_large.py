"""The memory of a large model: what is measured and counted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import open_clip
import pytest

from benchmarks.step import large

# Without texts that train or words, which take most of the time.
SHORT = {"lock_text": True, "anchors": "none", "image_anchor": 0.0}


@pytest.mark.slow
def test_a_model_is_measured_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = {"all weights": SHORT, "--lora-rank 16": SHORT | {"lora_rank": 16}}
    monkeypatch.setattr(large, "FORMS", forms)
    tower = {"image_size": 224, "layers": 3, "width": 384, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 384, "vision_cfg": tower, "text_cfg": text}
    (tmp_path / "few-layers.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "few-layers.json")
    monkeypatch.setattr(large, "MODELS", {"few-layers": {}})
    monkeypatch.setattr(large, "_alone", lambda call, *given: call(*given))
    large.main(["--output", str(tmp_path / "out.csv")])
    with (tmp_path / "out.csv").open(newline="") as file:
        whole, _, large_batch, adapters, *_ = csv.DictReader(file)
    assert float(whole["models"]) > 1.5 * float(adapters["models"])
    assert float(whole["optimizer"]) > float(adapters["optimizer"]) > 0
    assert int(large_batch["on_8"]) < int(large_batch["on_16"]) <= 16384
    assert whole["measured"] == "" and whole["batch"] == "64"
    # The smaller batch fits as a whole.
    assert whole["on_8"] == "64" and float(large_batch["kept"]) > 100
    assert "| few-layers | all weights | 64 | - | " in capsys.readouterr().out


@pytest.mark.slow
def test_a_measured_step_is_near_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "FORMS", {"short": SHORT | {"grad_checkpointing": True}})
    monkeypatch.setattr(large, "BATCHES", (16,))
    (row,) = large.rows_of("ViT-S-32", "short")
    counted = row["counted"]
    assert isinstance(counted, float)
    assert 0.6 < counted / large.measured("ViT-S-32", "short", 16) < 1.1
