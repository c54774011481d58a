from __future__ import annotations

import os
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from mulki.clip import models
from mulki.errors import InputError
from tests.clip.models.model_helpers import PROMPTS, Load


def test_names_with_a_slash(tiny_models: tuple[str, ...]) -> None:
    assert models.load("tiny/vit").name == "tiny-vit"


def test_loaded_model(load_tiny: Load) -> None:
    model = load_tiny()
    assert model.image_size == 32 and model.device.type == "cpu"
    assert model.preprocess(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    assert model.tokenizer(PROMPTS).shape == (3, 16)
    assert not any(module.training for module in model.clip.modules())


@pytest.mark.parametrize(
    ("name", "pretrained", "said"),
    [
        ("tiny-vitt", None, 'tiny-vitt.*did you mean "tiny-vit"'),
        ("mulki-mni", None, 'mulki-mni.*did you mean "mulki-mini"'),
        ("ViT-B-32", "laion2b_s34b_b79", r"--pretrained: ViT-B-32 has no tag.*did you mean"),
        ("tiny-vit", "openai", "--pretrained: tiny-vit has no tag 'openai'.*tags: none"),
        ("tiny-vit", "gone.pt", "--pretrained: no file gone.pt"),
        ("tiny-vit", "gone/weights", "--pretrained: no file gone/weights"),
        ("local-dir:gone", None, "--model local-dir:gone.*gone"),
        ("local-dir:gone", "openai", "--pretrained: local-dir:gone brings its own weights"),
        ("nosuch:thing", None, "--model nosuch:thing"),
    ],
)
def test_bad_names(
    tiny_models: tuple[str, ...], name: str, pretrained: str | None, said: str
) -> None:
    with pytest.raises(InputError, match=said) as info:
        models.load(name, pretrained)
    assert "\n" not in str(info.value)


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_pipe_is_called_what_it_is(tiny_models: tuple[str, ...], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pt")
    for name in ("tiny-vit", models.BUNDLED):
        with pytest.raises(InputError, match=r"w\.pt: a pipe, socket or device"):
            models.load(name, str(tmp_path / "w.pt"))


def test_a_frozen_transformer_under_autocast_multiplies_no_copies_of_its_weights(
    load_tiny: Load,
) -> None:
    model = load_tiny()
    model.eval()
    raw = open_clip.create_model("tiny-vit").eval()
    raw.load_state_dict(model.clip.state_dict())
    images, tokens = torch.randn(3, 3, 32, 32), model.tokenizer(PROMPTS)
    with torch.no_grad():
        expected = raw.encode_image(images), raw.encode_text(tokens)
        found = model.clip.encode_image(images), model.clip.encode_text(tokens)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    def products(clip: nn.Module) -> int:
        clip.requires_grad_(False)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as p:
            clip.encode_image(images)
        return sum(event.count for event in p.key_averages() if event.key == "aten::bmm")

    assert products(model.clip) == 0
    assert products(raw) > 0, "open_clip's own order no longer needs this: take it away"
