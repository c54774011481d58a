from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mulki.clip import models
from mulki.clip.models import PREPROCESS, VisionLanguageModel
from mulki.clip.tensor_files import save_tensors
from mulki.errors import InputError
from mulki.train.saving.checkpoints import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_checkpoint,
    publish,
    save_weights,
)
from tests.train_helpers import same_state, state_of

Load = Callable[..., VisionLanguageModel]
ARCHITECTURES = ["tiny-vit", "tiny-resnet", "tiny-biased"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_open_clip_loads_a_checkpoint(load_tiny: Load, tmp_path: Path, name: str) -> None:
    model = load_tiny(name, seed=7)
    model.eval()
    path = tmp_path / "task_01_x.safetensors"
    save_weights(model, path)
    clip = open_clip.create_model(name, pretrained=str(path)).eval()
    images = torch.randn(3, 3, 32, 32)
    tokens = open_clip.get_tokenizer(name)(["a cat", "two dogs"])
    with torch.no_grad():
        torch.testing.assert_close(
            clip.encode_image(images, normalize=True), model.encode_images(images)
        )
        torch.testing.assert_close(
            clip.encode_text(tokens, normalize=True), model.encode_texts(tokens)
        )
    assert same_state(clip.state_dict(), state_of(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_folder_is_an_open_clip_model(load_tiny: Load, tmp_path: Path, name: str) -> None:
    model = load_tiny(name, seed=7)
    save_weights(model, tmp_path / "w.safetensors")
    publish(model, tmp_path / "w.safetensors", tmp_path / "latest")
    assert {p.name for p in (tmp_path / "latest").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    again = models.load(f"local-dir:{tmp_path / 'latest'}")
    assert same_state(state_of(again), state_of(model))
    picture = Image.effect_noise((40, 50), 80).convert("RGB")
    assert torch.equal(again.preprocess(picture), model.preprocess(picture))


def test_published_model_can_be_published_again(load_tiny: Load, tmp_path: Path) -> None:
    """A run that starts from the result of another ends with a folder like the first one's."""
    model = load_tiny()
    save_weights(model, tmp_path / "1.safetensors")
    publish(model, tmp_path / "1.safetensors", tmp_path / "first")
    second = models.load(f"local-dir:{tmp_path / 'first'}")
    save_weights(second, tmp_path / "2.safetensors")
    publish(second, tmp_path / "2.safetensors", tmp_path / "second")
    third = models.load(f"local-dir:{tmp_path / 'second'}")
    assert same_state(state_of(third), state_of(model))


def test_publishing_again_replaces_and_keeps_the_older_checkpoint(
    load_tiny: Load, tmp_path: Path
) -> None:
    paths = []
    for seed in (1, 2):
        model = load_tiny(seed=seed)
        paths.append(tmp_path / f"{seed}.safetensors")
        save_weights(model, paths[-1])
        publish(model, paths[-1], tmp_path / "latest")
    latest = (tmp_path / "latest" / WEIGHTS_NAME).read_bytes()
    assert latest == paths[1].read_bytes() != paths[0].read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_weights_are_copied_where_they_cannot_be_linked(
    load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    save_weights(load_tiny(), tmp_path / "w.safetensors")
    publish(load_tiny(), tmp_path / "w.safetensors", tmp_path / "latest")
    copied = (tmp_path / "latest" / WEIGHTS_NAME).read_bytes()
    assert copied == (tmp_path / "w.safetensors").read_bytes()


def test_failed_write_keeps_the_older_file(
    load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(load_tiny(), path)
    before = path.read_bytes()

    def full(path: Path) -> None:
        assert path.read_bytes()  # what was written so far
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("mulki.clip.tensor_files.load_tensors", full)
    with pytest.raises(OSError, match="disk full"):
        save_weights(load_tiny(seed=1), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]


def test_checkpoint_says_what_it_is(load_tiny: Load, tmp_path: Path) -> None:
    save_weights(load_tiny(), tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        metadata = file.metadata()
    assert len(metadata.pop("sha256")) == 64
    assert json.loads(metadata.pop(PREPROCESS))["size"] == [32, 32]
    assert metadata == {"format": "pt", "model": "tiny-vit"}


def test_config_holds_architecture_and_preprocessing(load_tiny: Load, tmp_path: Path) -> None:
    save_weights(load_tiny(), tmp_path / "w.safetensors")
    publish(load_tiny(), tmp_path / "w.safetensors", tmp_path / "latest")
    config = json.loads((tmp_path / "latest" / CONFIG_NAME).read_text())
    assert config["model_cfg"]["vision_cfg"]["patch_size"] == 16
    assert tuple(config["preprocess_cfg"]["size"]) == (32, 32)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_publication_is_whole_wherever_it_fails(
    load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    old, new = load_tiny(seed=1), load_tiny(seed=2)
    save_weights(old, tmp_path / "1.safetensors")
    save_weights(new, tmp_path / "2.safetensors")
    latest = tmp_path / "latest"
    allowed = [state_of(new), *([state_of(old)] if earlier else [])]
    at = calls = 0

    def failing(real: Callable[..., None]) -> Callable[..., None]:
        def call(*given: object) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError("power cut")
            real(*given)

        return call

    while calls >= at:  # until a publication has fewer calls than that
        shutil.rmtree(latest, ignore_errors=True)
        if earlier:
            publish(old, tmp_path / "1.safetensors", latest)
        at, calls = at + 1, 0
        with monkeypatch.context() as patch, contextlib.suppress(OSError):
            for name in ("link", "replace", "fsync"):
                patch.setattr(os, name, failing(getattr(os, name)))
            publish(new, tmp_path / "2.safetensors", latest)
        if latest.exists() or earlier:
            found = state_of(models.load(f"local-dir:{latest}"))
            assert any(same_state(found, state) for state in allowed)
    assert at > 3 and not list(tmp_path.glob(".*"))


def test_whole_numbers_are_no_weights(load_tiny: Load, tmp_path: Path) -> None:
    """Of a model that is known by its place, whose weights are loaded here."""
    save_weights(load_tiny(), tmp_path / "w.safetensors")
    publish(load_tiny(), tmp_path / "w.safetensors", tmp_path / "latest")
    state = {name: value.int() for name, value in load_tiny().checkpoint().items()}
    save_tensors(tmp_path / "w.safetensors", state, {"model": f"local-dir:{tmp_path / 'latest'}"})
    with pytest.raises(InputError, match=r"w\.safetensors: .*is torch\.int32, wanted floating"):
        load_checkpoint(tmp_path / "w.safetensors")
