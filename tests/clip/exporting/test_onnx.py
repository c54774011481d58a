from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mulki.clip.exporting.onnx import export_onnx
from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError

Load = Callable[..., VisionLanguageModel]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-biased"])
def test_towers(load_tiny: Load, tmp_path: Path, name: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}")
    import onnxruntime

    model = load_tiny(name, seed=3)
    assert export_onnx(model, tmp_path / "out") < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tokens = model.tokenizer(["a cat", "two dogs", "x", "y"])
    assert tokens.shape[1] == config["text"]["context_length"]
    pixels = torch.randn(5, 3, model.image_size, model.image_size)
    features = []
    for part, value in (("image", pixels), ("text", tokens)):
        session = onnxruntime.InferenceSession(str(tmp_path / "out" / config[part]["file"]))
        (found,) = session.run(None, {config[part]["input"]: value.numpy()})
        features.append(torch.from_numpy(found))
    with torch.no_grad():
        torch.testing.assert_close(features[0], model.encode_images(pixels))
        torch.testing.assert_close(
            features[1], model.encode_texts(model.text_inputs(["a cat", "two dogs", "x", "y"]))
        )
    assert config["logit_scale"] == pytest.approx(float(model.logit_scale))
    assert config["logit_bias"] == (-10 if name == "tiny-biased" else None)


def test_packages_that_are_missing(
    load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mulki.clip.exporting.checks.find_spec", lambda name: None)
    with pytest.raises(InputError, match="^--to onnx: .*onnxruntime"):
        export_onnx(load_tiny(), tmp_path / "out")


def test_a_model_that_torch_cannot_export(
    load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr("mulki.clip.exporting.onnx.need_packages", lambda *names: None)
    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(InputError, match="image tower .*no such operator"):
        export_onnx(load_tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
