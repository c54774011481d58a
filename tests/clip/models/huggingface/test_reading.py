from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from mulki.clip import models
from mulki.clip.exporting.huggingface import export_huggingface
from mulki.clip.models.huggingface.reading import load_huggingface
from mulki.errors import InputError
from mulki.train.saving.checkpoints import load_checkpoint, publish, save_weights
from tests.clip.models.huggingface.folders import (
    clip_model,
    of_transformers,
    saved,
    siglip_model,
    tokenizer_of_words,
    transformers,
)
from tests.train_helpers import same_state, state_of

TEXTS = ["a photo of a cat", "two dogs", "red dog " * 40]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **options: Any) -> None:
        raise AssertionError("a network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)


def folder_of(kind: str, folder: Path, **changes: Any) -> tuple[Any, Path]:
    if kind == "clip":
        model = clip_model(**changes)
        # OpenAI's own has 49408 words, and needs no files.
        tokenizer = tokenizer_of_words() if "vocab_size" in changes.get("text", {}) else None
        return model, saved(
            model,
            folder,
            tokenizer,
            transformers.CLIPImageProcessor(
                size={"shortest_edge": 32},
                crop_size={"height": 32, "width": 32},
                image_mean=[0.4] * 3,
            ),
        )
    model = siglip_model(**changes)
    return model, saved(
        model,
        folder,
        tokenizer_of_words(),
        transformers.SiglipImageProcessor(size={"height": 32, "width": 32}, resample=2),
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("clip", {}),
        ("clip", {t: {"hidden_act": "gelu", "layer_norm_eps": 1e-4} for t in ("text", "vision")}),
        ("clip", {t: {"hidden_act": "gelu_new"} for t in ("text", "vision")}),
        ("clip", {"text": {"vocab_size": 49500}}),
        ("siglip", {}),
        ("siglip", {t: {"hidden_act": "gelu"} for t in ("text", "vision")}),
    ],
)
def test_features_are_those_of_transformers(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs, folder = folder_of(kind, tmp_path, **changes)
    model: Any = models.load(f"hf-local:{folder}")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = model.tokenizer(TEXTS)
    if "vocab_size" in changes.get("text", {}):
        tokens[:, 5] = 49407  # the end, which is not the last one of this vocabulary
        tokens[:, 7] = 49450
    images, texts = of_transformers(theirs, pixels, tokens)
    torch.testing.assert_close(model.encode_images(pixels), images, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(model.encode_texts(tokens), texts, atol=2e-6, rtol=1e-5)
    assert float(model.logit_scale) == pytest.approx(float(theirs.logit_scale.exp()))
    if kind == "siglip":
        assert model.clip.logit_bias.item() == pytest.approx(theirs.logit_bias.item())


def test_what_the_folder_says_of_images_and_words(tmp_path: Path) -> None:
    _, clip = folder_of("clip", tmp_path / "clip")
    preprocess = load_huggingface(str(clip)).clip.visual.preprocess_cfg
    assert (preprocess["resize_mode"], preprocess["interpolation"]) == ("shortest", "bicubic")
    assert preprocess["mean"] == (0.4, 0.4, 0.4)
    _, siglip = folder_of("siglip", tmp_path / "siglip")
    model = load_huggingface(str(siglip))
    preprocess = model.clip.visual.preprocess_cfg
    assert (preprocess["resize_mode"], preprocess["interpolation"]) == ("squash", "bilinear")
    assert model.tokenizer(["two red dogs"])[0].tolist() == [7, 9, 8] + [0] * 9


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_is_published_of_it_is_open_clips(kind: str, tmp_path: Path) -> None:
    """Also where it is published from the published folder again, and the first one is gone."""
    _, folder = folder_of(kind, tmp_path / "in")
    model = models.load(f"hf-local:{folder}")
    model.lock()
    weights = tmp_path / "weights.safetensors"
    save_weights(model, weights)
    publish(model, weights, tmp_path / "one")
    folder.rename(tmp_path / "elsewhere")
    again = models.load(f"local-dir:{tmp_path / 'one'}")
    publish(again, weights, tmp_path / "two")
    (tmp_path / "one").rename(tmp_path / "gone")
    place = f"local-dir:{tmp_path / 'two'}"
    clip, _, _ = open_clip.create_model_and_transforms(place)
    assert same_state(clip.state_dict(), state_of(model))
    assert torch.equal(open_clip.get_tokenizer(place)(TEXTS), model.tokenizer(TEXTS))
    assert clip.visual.preprocess_cfg == again.clip.visual.preprocess_cfg
    pixels = torch.randn(2, 3, 32, 32)
    model.eval()
    found = torch.nn.functional.normalize(clip.eval().encode_image(pixels), dim=1)
    torch.testing.assert_close(found, model.encode_images(pixels))
    # The checkpoint of a task says its model by the place that the run began with.
    loaded = load_checkpoint(weights, place)
    assert same_state(state_of(loaded), state_of(model))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_out_and_in_again(kind: str, tmp_path: Path) -> None:
    _, folder = folder_of(kind, tmp_path / "in")
    model = load_huggingface(str(folder))
    assert export_huggingface(model, tmp_path / "out") < 1e-5
    again = load_huggingface(str(tmp_path / "out"))
    assert same_state(state_of(again), state_of(model))
    assert torch.equal(again.tokenizer(TEXTS), model.tokenizer(TEXTS))
    assert again.clip.visual.preprocess_cfg == model.clip.visual.preprocess_cfg


def test_weights_in_several_files(tmp_path: Path) -> None:
    model, folder = folder_of("clip", tmp_path)
    model.save_pretrained(folder / "parts", max_shard_size="1MB")
    parts = folder / "parts"
    assert len(list(parts.glob("model-*.safetensors"))) > 1
    assert same_state(
        state_of(load_huggingface(str(parts))), state_of(load_huggingface(str(folder)))
    )
    next(iter(sorted(parts.glob("model-*.safetensors")))).unlink()
    with pytest.raises(InputError, match="no model-00001-of-"):
        load_huggingface(str(parts))
    index = parts / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../model.safetensors"}}))
    with pytest.raises(InputError, match="model.safetensors.index.json"):
        load_huggingface(str(parts))


def test_what_is_left_out_is_taken_as_usual(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(clip_model(), tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_huggingface(str(tmp_path))
    assert "no tokenizer" in caplog.text and "how images are prepared" in caplog.text
    assert isinstance(model.tokenizer, open_clip.SimpleTokenizer)
    assert model.clip.visual.preprocess_cfg["mean"][0] == pytest.approx(0.48145466)


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            load_huggingface(str(tmp_path))
        assert str(caught.value).startswith(f"--model hf-local:{tmp_path}: ")
        assert "\n" not in str(caught.value)

    refused("no config.json")
    saved(siglip_model(), tmp_path)
    refused("no files of a tokenizer")
    tokenizer_of_words().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 64}}')
    refused("no transform of open_clip")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": "grey"}')
    refused("cannot be understood")
    (tmp_path / "preprocessor_config.json").write_text("[")
    refused("preprocessor_config.json")
    (tmp_path / "preprocessor_config.json").unlink()
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    save_file({name: value.int() for name, value in load_file(weights).items()}, weights)
    refused("is torch.int32, wanted floating point numbers")
    weights.write_bytes(content[:-100])
    refused("model.safetensors")
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin is not read, since it could run code")
    weights.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("tokens up to 11, .* 5 ")
    config["text_config"]["vocab_size"] = 13
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("token_embedding.weight")
    with pytest.raises(InputError, match="nothing"):
        load_huggingface(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="^--pretrained: "):
        models.load(f"hf-local:{tmp_path}", "openai")
