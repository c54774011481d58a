from __future__ import annotations

import json
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import set_model_preprocess_cfg
from PIL import Image
from safetensors.torch import save_file

from mulki.clip import models
from mulki.clip.models import PREPROCESS, open_clip_models
from mulki.errors import InputError
from mulki.train.saving.checkpoints import WEIGHTS_NAME, publish, save_weights
from tests.clip.models.model_helpers import Load, bad_checkpoint
from tests.train_helpers import ARCHITECTURES, same_state, state_of


def test_random_weights_are_announced(
    tiny_models: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models.load("tiny-vit")
    assert "tiny-vit starts from random weights; --pretrained" in caplog.text
    caplog.clear()
    save_weights(model, tmp_path / "w.safetensors")
    again = models.load("tiny-vit", str(tmp_path / "w.safetensors"))
    assert same_state(state_of(again), state_of(model))
    assert "random weights" not in caplog.text


def test_weights_with_another_activation_are_refused() -> None:
    tags = open_clip_models.pretrained_tags("ViT-B-32")
    assert "laion2b_s34b_b79k" in tags and "openai" not in tags
    assert "openai" in open_clip_models.pretrained_tags("ViT-B-32-quickgelu")
    with pytest.raises(InputError, match=r"QuickGELU.*; pass --model ViT-B-32-quickgelu$"):
        models.load("ViT-B-32", "openai")
    assert open_clip_models.trained_one("RN50") == ("RN50-quickgelu", "openai")


def test_a_file_says_how_its_model_wants_images(
    tiny_models: tuple[str, ...], load_tiny: Load, tmp_path: Path
) -> None:
    """As the tags of SigLIP: open_clip takes the statistics of CLIP for any file."""
    model, file = load_tiny(), str(tmp_path / "w.safetensors")
    wanted = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"}
    set_model_preprocess_cfg(model.clip, wanted | {"resize_mode": "squash", "size": (32, 32)})
    save_weights(model, Path(file))
    again = models.load("tiny-vit", file)
    grey = Image.new("RGB", (32, 64), (128, 128, 128))
    assert tuple(again.clip.visual.image_mean) == (0.5,) * 3
    assert (again.preprocess(grey) - (128 / 255 - 0.5) / 0.25).abs().max() < 1e-6
    assert "interpolation=bilinear" in str(again.preprocess)
    tensors = {name: value.contiguous() for name, value in state_of(model).items()}
    save_file(tensors, file, {PREPROCESS: "{"})
    with pytest.raises(InputError, match="could not be loaded"):
        models.load("tiny-vit", file)


def test_weights_of_another_program_take_images_as_the_tags_of_their_model(
    tiny_models: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Most often such a file is the download of a tag."""
    import open_clip.pretrained

    tag = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    tags = {"a": tag, "b": tag}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", tags)
    torch.save(models.load("tiny-vit", "none").clip.state_dict(), tmp_path / "w.pt")
    caplog.clear()
    again = models.load("tiny-vit", str(tmp_path / "w.pt"))
    assert tuple(again.clip.visual.image_mean) == (0.5,) * 3 and not caplog.text
    assert "interpolation=bilinear" in str(again.preprocess)
    tags["c"] = {"mean": (0.25,) * 3}
    again = models.load("tiny-vit", str(tmp_path / "w.pt"))
    assert tuple(again.clip.visual.image_mean) == (0.5,) * 3
    assert "tiny-vit: its tags differ in how they want images; taken is" in caplog.text


def test_a_file_of_another_model_is_refused(
    tiny_models: tuple[str, ...], load_tiny: Load, tmp_path: Path
) -> None:
    """Also where all shapes are the same, as those of models with another activation."""
    model = load_tiny()
    model.name = "tiny-resnet"
    save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"w\.safetensors is of tiny-resnet"):
        models.load("tiny-vit", str(tmp_path / "w.safetensors"))


def test_a_folder_without_weights_is_no_random_model(load_tiny: Load, tmp_path: Path) -> None:
    save_weights(load_tiny(), tmp_path / "w.safetensors")
    publish(load_tiny(), tmp_path / "w.safetensors", tmp_path / "latest")
    (tmp_path / "latest" / WEIGHTS_NAME).unlink()
    with pytest.raises(InputError, match="--model local-dir:.* could not be loaded"):
        models.load(f"local-dir:{tmp_path / 'latest'}")


@pytest.mark.parametrize("content", [b"", b"not weights", {"a": torch.ones(2)}])
def test_bad_checkpoint(
    tiny_models: tuple[str, ...], tmp_path: Path, content: bytes | dict[str, torch.Tensor]
) -> None:
    path = bad_checkpoint(tmp_path, content)
    with pytest.raises(InputError, match="bad.safetensors") as info:
        models.load("tiny-vit", path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("no route\nto host", "(no route to host)"),
        ("It failed. " * 40, "(" + "It failed. " * 26 + "It failed.)"),
        ("word " * 100, "(" + "word " * 59 + "word ...)"),
    ],
)
def test_a_long_reason_ends_with_a_whole_sentence(
    tiny_models: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, said: str, shown: str
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise OSError(said)

    monkeypatch.setattr("open_clip.create_model_and_transforms", fail)
    with pytest.raises(InputError) as info:
        models.load("tiny-vit", "none")
    assert shown in str(info.value)


@pytest.mark.parametrize("published", [False, True])
def test_a_flipped_bit_of_a_checkpoint_is_found(
    load_tiny: Load, tmp_path: Path, published: bool
) -> None:
    file = tmp_path / "w.safetensors"
    save_weights(load_tiny(), file)
    given: tuple[str, ...] = ("tiny-vit", str(file))
    if published:
        publish(load_tiny(), file, tmp_path / "latest")
        given, file = (f"local-dir:{tmp_path / 'latest'}",), tmp_path / "latest" / WEIGHTS_NAME
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name}: .*checksum"):
        models.load(*given)


def test_what_is_wrong_with_a_checkpoint_is_named(load_tiny: Load, tmp_path: Path) -> None:
    state = load_tiny().checkpoint()
    save_file({n: v for n, v in state.items() if n != "visual.proj"}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="visual.proj"):
        models.load("tiny-vit", str(tmp_path / "w.safetensors"))


def test_a_checkpoint_that_would_fill_the_memory_is_refused(
    tiny_models: tuple[str, ...], tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("w/data.pkl", bytes(80 * 10**6))
    with pytest.raises(InputError, match=r"w\.pt: unpacks to more than 100 times its \d+ bytes"):
        models.load("tiny-vit", str(tmp_path / "w.pt"))


def test_whole_numbers_are_no_weights(load_tiny: Load, tmp_path: Path) -> None:
    state = {**load_tiny().checkpoint()}
    state["visual.proj"] = state["visual.proj"].int()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"visual\.proj is torch\.int32, wanted floating"):
        models.load("tiny-vit", str(tmp_path / "w.safetensors"))


def test_checkpoint_of_another_width(
    load_tiny: Load, tmp_path: Path, tiny_models: tuple[str, ...]
) -> None:
    save_weights(load_tiny("tiny-resnet"), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="w.safetensors"):
        models.load("tiny-vit", str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("content", ["{", "{}", '{"model_cfg": 3}'])
def test_damaged_model_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(InputError, match="--model local-dir:") as info:
        models.load(f"local-dir:{tmp_path}")
    assert "\n" not in str(info.value)


def test_towers_that_were_published_are_found_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "image_tower").mkdir()
    (tmp_path / "image_tower" / "config.json").write_text("{}")
    path = tmp_path / "open_clip_config.json"

    def found(text: dict[str, object], vision: dict[str, object]) -> object:
        written = {"model_cfg": {"text_cfg": text, "vision_cfg": vision}, "preprocess_cfg": {}}
        path.write_text(json.dumps(written))
        return open_clip_models._towers_here(f"local-dir:{tmp_path}")

    old = {"hf_model_name": "/old", "hf_tokenizer_name": "/old", "hf_model_pretrained": False}
    here = str(tmp_path.resolve())
    tower = {"timm_model_name": "local-dir:/old/image_tower", "timm_model_pretrained": False}
    assert found(old, tower) == {
        "text_cfg": old | {"hf_model_name": here, "hf_tokenizer_name": here},
        "vision_cfg": tower | {"timm_model_name": f"local-dir:{here}/image_tower"},
    }
    assert found(old | {"hf_model_name": "roberta-base"}, {"timm_model_name": "vit"}) == {}
    assert found(old | {"hf_model_pretrained": True}, {}) == {}


def test_the_configuration_of_a_model_of_a_hub(
    monkeypatch: pytest.MonkeyPatch, load_tiny: Load, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    model = load_tiny()
    save_weights(model, tmp_path / "weights.safetensors")
    publish(model, tmp_path / "weights.safetensors", folder)

    def cached(place: str, filename: str) -> str:
        assert place == "owner/name"
        return str(folder / filename)

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", cached)
    of_hub = open_clip_models._architecture("hf-hub:owner/name")
    assert of_hub == open_clip_models._architecture(f"local-dir:{folder}")


def test_a_stand_in_needs_neither_weights_nor_a_tokenizer(
    tiny_models: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far(*_: object, **__: object) -> None:
        raise OSError("no network")

    few = ARCHITECTURES["tiny-vit"] | {
        "text_cfg": ARCHITECTURES["tiny-vit"]["text_cfg"] | {"vocab_size": 300}
    }
    (tmp_path / "tiny-words.json").write_text(json.dumps(few))
    open_clip.add_model_config(tmp_path)
    assert models.load("tiny-words", "any", stand_in=True).tokenizer(["a"]).shape == (1, 16)
    monkeypatch.setattr(open_clip, "get_tokenizer", far)
    model = models.load("tiny-words", stand_in=True)
    tokens = model.tokenizer(["a photo of a cat", "two dogs"])
    assert tokens.shape == (2, 16) and 0 <= int(tokens.min()) < int(tokens.max()) < 300
    assert model.encode_texts(model.text_inputs(["a cat"])).shape == (1, 32)
    with pytest.raises(InputError, match="no model 'no-such'"):
        models.load("no-such", stand_in=True)
