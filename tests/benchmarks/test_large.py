"""The memory of a large model: what is measured and counted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.step import large


@pytest.mark.slow
def test_a_model_is_measured_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = {name: large.FORMS[name] for name in ("all weights", "--lora-rank 16")}
    monkeypatch.setattr(large, "FORMS", forms)
    monkeypatch.setattr(large, "MODELS", {"ViT-S-32": {}})
    monkeypatch.setattr(large, "BATCHES", (16384,))
    large.main(["--output", str(tmp_path / "out.csv")])
    with (tmp_path / "out.csv").open(newline="") as file:
        whole, adapters = csv.DictReader(file)
    assert float(whole["models"]) > 2 * float(adapters["models"])
    assert float(whole["optimizer"]) > float(adapters["optimizer"]) > 0
    assert 0 < int(whole["on_8"]) < int(whole["on_16"]) < int(adapters["on_80"])
    assert whole["measured"] == "" and float(whole["kept"]) > 100
    assert "| ViT-S-32 | all weights | 16384 | - | " in capsys.readouterr().out


@pytest.mark.slow
def test_a_measured_step_is_near_what_is_counted() -> None:
    row = large.measure("ViT-S-32", "all weights, --grad-checkpointing", 8, measured=True)
    measured, counted = row["measured"], row["counted"]
    assert isinstance(measured, float) and isinstance(counted, float)
    assert 0.7 < counted / measured < 1.1
