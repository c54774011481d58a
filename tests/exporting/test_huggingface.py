from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mulki.errors import InputError
from mulki.exporting.huggingface import clip_weights, export_huggingface
from mulki.models import VisionLanguageModel

Load = Callable[..., VisionLanguageModel]
transformers = pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture
def exported(load_tiny: Load, tmp_path: Path) -> tuple[VisionLanguageModel, Path]:
    model = load_tiny(seed=5)
    assert export_huggingface(model, tmp_path / "out") < 1e-6
    return model, tmp_path / "out"


def test_transformers_says_what_the_original_says(
    exported: tuple[VisionLanguageModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pictures and texts on, by transformers' own classes and without a network."""
    model, folder = exported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clip = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    texts = ["a photo of a red fox.", "two Dogs", "it's"]
    pictures = [Image.effect_noise((40, 50), 80).convert("RGB") for _ in range(2)]
    with torch.no_grad():
        found = clip(
            **tokenizer(texts, padding=True, return_tensors="pt"),
            **processor(pictures, return_tensors="pt"),
        )
        images = model.encode_images(torch.stack([model.preprocess(p) for p in pictures]))
        words = model.encode_texts(model.text_inputs(texts))
        logits = model.logit_scale * images @ words.mT
    torch.testing.assert_close(F.normalize(found.text_embeds, dim=1), words)
    # Processors round pixels to whole numbers after resizing, at other places.
    torch.testing.assert_close(F.normalize(found.image_embeds, dim=1), images, atol=2e-3, rtol=0.02)
    torch.testing.assert_close(found.logits_per_image, logits, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "reason"), [("tiny-resnet", "visual.bn1"), ("tiny-biased", "logit_bias")]
)
def test_other_architectures_are_refused(
    load_tiny: Load, tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(InputError, match=f"no CLIP of this architecture .*{reason}"):
        export_huggingface(load_tiny(name), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_check_notices_weights_in_the_wrong_place(
    load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(state: object, name: str) -> dict[str, torch.Tensor]:
        found = clip_weights(state, name)  # type: ignore[arg-type]
        one, other = (f"vision_model.encoder.layers.0.self_attn.{n}_proj.weight" for n in "qv")
        found[one], found[other] = found[other], found[one]
        return found

    monkeypatch.setattr("mulki.exporting.huggingface.clip_weights", swapped)
    with pytest.raises(InputError, match="features of images differ"):
        export_huggingface(load_tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
