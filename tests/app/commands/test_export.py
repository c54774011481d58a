from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mulki.app.cli import run_command

Refused = Callable[[Sequence[object]], str]


def test_a_run_for_transformers(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    out = tmp_path / "out"
    assert run_command(["export", str(finished), "--to", "huggingface", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert {"config.json", "model.safetensors"} <= {path.name for path in out.iterdir()}


def test_bad_input(refused: Refused, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--to" in refused(["export", finished, out])
    assert 'mean "huggingface"' in refused(["export", finished, "--to", "hugging", out])
    assert "no such file" in refused(["export", tmp_path / "none", "--to", "onnx", out])
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    said = refused(["export", finished, "--to", "huggingface", tmp_path / "full"])
    assert "is not empty" in said
