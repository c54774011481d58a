from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mulki
from mulki.clip.exporting.onnx import Classes, export_onnx
from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError

Load = Callable[..., VisionLanguageModel]


@pytest.mark.slow
def test_towers(load_tiny: Load, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}")
    import onnxruntime
    import tokenizers

    model = load_tiny("tiny-biased", seed=3)
    model.name = f"local-dir:{tmp_path}/model"
    model.config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "latest")
    # The second is a name that looks like a path.
    classes = Classes(("cat", "/m/0bt9lr"), 5 * torch.randn(2, 32), torch.tensor([1.0, -1.0]))
    assert export_onnx(model, tmp_path / "out", classes) < 1e-5
    text = (tmp_path / "out" / "config.json").read_text()
    config = json.loads(text)
    # A folder by its own name, and no place on this machine.
    assert str(tmp_path) not in text and config["model"] == "local-dir:model"
    assert config["open_clip"]["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "latest"
    tokens = model.tokenizer(["a cat", "two dogs", "x", "y"])
    assert tokens.shape[1] == config["text"]["context_length"]
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / config["text"]["tokenizer"]))
    encoded = made.encode_batch(["a cat", "two dogs", "x", "y"])
    assert torch.equal(torch.tensor([each.ids for each in encoded]), tokens)
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
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / config["classifier"]["file"]))
    (logits,) = session.run(None, {config["classifier"]["input"]: pixels.numpy()})
    wanted = features[0] @ classes.weight.mT + classes.bias
    torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=1e-4, atol=1e-4)
    assert [each.name for each in session.get_outputs()] == ["logits"]
    assert config["classifier"]["classes"] == ["cat", "/m/0bt9lr"]
    places = [str(Path(module.__file__).parent).encode() for module in (mulki, torch)]
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert not [place for place in places if place in content], file
    assert config["logit_scale"] == pytest.approx(float(model.logit_scale))
    assert config["logit_bias"] == -10


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
