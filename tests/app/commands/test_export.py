from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import mulki
from mulki.app.cli import run_command

Refused = Callable[[Sequence[object]], str]


def test_a_run_with_its_classes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def record(*of: Any) -> float:
        given.append(of)
        return 0.0

    # What it writes has tests of its own.
    monkeypatch.setattr("mulki.clip.exporting.onnx.export_onnx", record)
    out = tmp_path / "out"
    assert run_command(["export", str(finished), "--to", "onnx", "--classes", str(out)]) == 0
    ((_, folder, classes),) = given
    assert folder == out
    assert classes.names == ("blue", "green", "red", "dark", "light")
    assert classes.weight.shape == (5, 32) and classes.bias.shape == (5,)


def test_bad_input(refused: Refused, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--to" in refused(["export", finished, out])
    classes = ["export", finished, "--to", "huggingface", "--classes", out]
    assert "--classes: belongs to --to onnx" in refused(classes)
    assert 'mean "huggingface"' in refused(["export", finished, "--to", "hugging", out])
    assert "no such file" in refused(["export", tmp_path / "none", "--to", "onnx", out])
    weights = Path(mulki.__file__).parent / "data/embedded/mulki-mini/open_clip_model.safetensors"
    start = ["export", weights, "--model", "mulki-mini", "--to", "onnx", "--classes", out]
    assert "--classes: " in (said := refused(start)) and "says no classes; leave it out" in said
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    said = refused(["export", finished, "--to", "huggingface", tmp_path / "full"])
    assert "is not empty" in said
