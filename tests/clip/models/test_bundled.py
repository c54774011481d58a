"""The bundled model, built from a tiny text tower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mulki.clip import models
from mulki.clip.models import BUNDLED, quiet_transformers
from mulki.clip.models import bundled as bundled_module
from mulki.errors import InputError
from mulki.train.saving.checkpoints import publish, save_weights
from mulki.train.saving.description import Description
from tests.clip.models.model_helpers import PROMPTS, bad_checkpoint, hf_architecture
from tests.train_helpers import same_state, state_of


@pytest.fixture
def bundled(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the bundled model; returns its folder."""
    root = tmp_path / "package"
    folder = root / BUNDLED
    folder.mkdir(parents=True)
    shutil.copytree(bert, root / "model")
    config = {
        "model_cfg": hf_architecture("tiny_text"),
        "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    architecture = hf_architecture(str(bert))
    torch.manual_seed(3)
    clip = open_clip.CustomTextCLIP(**architecture)
    trained = {k: v for k, v in clip.state_dict().items() if not k.startswith("text.transformer.")}
    save_file(trained, folder / "open_clip_model.safetensors")
    monkeypatch.setattr(bundled_module, "resources", SimpleNamespace(files=lambda package: root))
    found = SimpleNamespace(find_spec=lambda package: object())
    monkeypatch.setattr(bundled_module, "util", found)
    return folder


def test_bundled_model(bundled: Path) -> None:
    model = models.load(BUNDLED)
    assert model.image_size == 32 and model.name == BUNDLED
    model.lock(text=True)
    stored = load_file(bundled / "open_clip_model.safetensors")
    assert same_state(dict(model.checkpoint()), stored)
    assert model.text_inputs(PROMPTS).shape == (3, 12)
    white = model.preprocess(Image.new("RGB", (50, 32), "white"))
    torch.testing.assert_close(white, torch.full((3, 32, 32), 2.0))
    assert model.config is not None
    assert model.config["model_cfg"]["text_cfg"]["hf_model_name"] == "tiny_text"


@pytest.mark.parametrize("lock_text", [True, False])
def test_checkpoint_of_the_bundled_model(bundled: Path, tmp_path: Path, lock_text: bool) -> None:
    """The text transformer is left out exactly if it is still the one of the package."""
    model = models.load(BUNDLED)
    model.lock(text=lock_text)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.01)
    save_weights(model, tmp_path / "w.safetensors")
    publish(model, tmp_path / "w.safetensors", tmp_path / "latest")
    saved = load_file(tmp_path / "w.safetensors")
    assert any(k.startswith("text.transformer.") for k in saved) is not lock_text
    again = models.load(BUNDLED, str(tmp_path / "w.safetensors"))
    assert same_state(state_of(again), state_of(model))
    # Locking it later does not make it the package's again.
    again.lock(text=True)
    assert same_state(dict(again.checkpoint()), saved)


def test_a_checkpoint_of_the_bundled_model_that_was_moved(bundled: Path, tmp_path: Path) -> None:
    """open_clip knows its text tower by an absolute path, and no file of it is written over."""
    model = models.load(BUNDLED)
    save_weights(model, tmp_path / "w.safetensors")
    said = Description((), {}, "", {})
    publish(model, tmp_path / "w.safetensors", tmp_path / "old", description=said)
    assert "If this folder was moved" in (tmp_path / "old" / "README.md").read_text()
    moved = tmp_path / "new"
    shutil.move(tmp_path / "old", moved)
    before = (moved / "open_clip_config.json").read_bytes()
    again = models.load(f"local-dir:{moved}")
    assert same_state(state_of(again), state_of(model))
    assert again.tokenizer(PROMPTS).shape == model.tokenizer(PROMPTS).shape
    assert (moved / "open_clip_config.json").read_bytes() == before
    assert again.config is not None
    text = again.config["model_cfg"]["text_cfg"]
    assert text["hf_model_name"] == text["hf_tokenizer_name"] == str(moved.resolve())


@pytest.mark.parametrize("content", [b"not weights", {"a": torch.ones(2)}])
def test_bad_checkpoint_of_the_bundled_model(
    bundled: Path, tmp_path: Path, content: bytes | dict[str, torch.Tensor]
) -> None:
    with pytest.raises(InputError, match="--pretrained: .*bad.safetensors"):
        models.load(BUNDLED, bad_checkpoint(tmp_path, content))


def test_which_files_hold_its_weights(bundled: Path, tmp_path: Path) -> None:
    state = load_file(bundled / "open_clip_model.safetensors")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"w\.pt is a PyTorch file .*safetensors\.torch"):
        models.load(BUNDLED, str(tmp_path / "w.pt"))
    save_file({name: value.int() for name, value in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"w\.safetensors: .* is torch\.int32, wanted floating"):
        models.load(BUNDLED, str(tmp_path / "w.safetensors"))


def test_progress_bars_of_transformers_stay_as_they_were() -> None:
    from transformers.utils import logging

    try:
        for change in (logging.disable_progress_bar, logging.enable_progress_bar):
            change()
            before = logging.is_progress_bar_enabled()
            with quiet_transformers():
                assert not logging.is_progress_bar_enabled()
            assert logging.is_progress_bar_enabled() is before
    finally:
        logging.enable_progress_bar()


@pytest.mark.parametrize("absent", ["tiny_text", "transformers"])
def test_missing_package_of_the_bundled_model(
    bundled: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    found = SimpleNamespace(find_spec=lambda package: None if package == absent else object())
    monkeypatch.setattr(bundled_module, "util", found)
    with pytest.raises(InputError, match=absent.replace("_", "-") + r".*mulki\[demo\]"):
        models.load(BUNDLED)


def test_bundled_model_that_is_not_there(bundled: Path) -> None:
    shutil.rmtree(bundled)
    with pytest.raises(InputError, match="open_clip_config.json"):
        models.load(BUNDLED)


def test_a_locked_image_tower_trains_nothing() -> None:
    """timm's own lock leaves the projection behind the tower out."""
    model = models.load(BUNDLED)
    model.lock(image=True)
    assert not any(name.startswith("visual.") for name in model.trainable())
