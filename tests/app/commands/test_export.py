from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import mulki
from mulki.app.cli import run_command

Refused = Callable[[Sequence[object]], str]


@pytest.mark.slow
def test_a_run_with_its_classes(finished: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(package, reason=f"needs {package}")
    out = tmp_path / "out"
    assert run_command(["export", str(finished), "--to", "onnx", "--classes", str(out)]) == 0
    files = {path.name for path in out.iterdir()}
    assert {"image.onnx", "text.onnx", "classifier.onnx", "tokenizer.json"} <= files
    config = json.loads((out / "config.json").read_text())
    assert config["logit_bias"] is None
    assert config["classifier"]["classes"] == ["blue", "green", "red", "dark", "light"]
    # Not even in the graphs.
    assert not [path.name for path in out.iterdir() if str(finished).encode() in path.read_bytes()]


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
