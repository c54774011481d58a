from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mulki.clip.exporting.huggingface import export_huggingface
from mulki.clip.models import VisionLanguageModel
from mulki.clip.models.huggingface.names import to_huggingface
from mulki.clip.models.huggingface.reading import load_huggingface
from mulki.errors import InputError
from tests.clip.models.huggingface import folders

Load = Callable[..., VisionLanguageModel]
transformers = pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture
def exported(load_tiny: Load, tmp_path: Path) -> tuple[VisionLanguageModel, Path]:
    model = load_tiny(seed=5)
    assert export_huggingface(model, tmp_path / "out") < 1e-6
    return model, tmp_path / "out"


def test_others_can_read_all_of_its_files(exported: tuple[VisionLanguageModel, Path]) -> None:
    modes = {path.stat().st_mode for path in exported[1].iterdir()}
    assert (exported[1] / "model.safetensors").is_file() and len(modes) == 1


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
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    text = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
    with torch.no_grad():
        (embeds, *_) = vision(**processor(pictures, return_tensors="pt"), return_dict=False)
        torch.testing.assert_close(F.normalize(embeds, dim=1), F.normalize(found.image_embeds))
        (embeds, *_) = text(
            **tokenizer(texts, padding=True, return_tensors="pt"), return_dict=False
        )
        torch.testing.assert_close(F.normalize(embeds, dim=1), words)


@pytest.mark.parametrize(
    ("name", "reason"), [("tiny-resnet", "visual.bn1"), ("tiny-biased", "logit_bias")]
)
def test_other_architectures_are_refused(
    load_tiny: Load, tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        export_huggingface(load_tiny(name), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_check_notices_weights_in_the_wrong_place(
    load_tiny: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = to_huggingface(state)
        one, other = (f"vision_model.encoder.layers.0.self_attn.{n}_proj.weight" for n in "qv")
        found[one], found[other] = found[other], found[one]
        return found

    monkeypatch.setattr("mulki.clip.exporting.huggingface.to_huggingface", swapped)
    with pytest.raises(InputError, match="features of images"):
        export_huggingface(load_tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def siglip(tmp_path: Path) -> VisionLanguageModel:
    """As open_clip has them: texts are cleaned before the tokenizer sees them."""
    folders.saved(folders.siglip_model(), tmp_path / "in", folders.tokenizer_of_words())
    model = load_huggingface(str(tmp_path / "in"))
    tokenizer: Any = model.tokenizer
    tokenizer.clean_fn = open_clip.tokenizer.get_clean_fn("canonicalize")
    return model


def test_a_siglip_is_exported(siglip: VisionLanguageModel, tmp_path: Path) -> None:
    assert export_huggingface(siglip, tmp_path / "out") < 1e-5
    theirs = transformers.SiglipModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["Two_dogs,  red!", "a photo (of) [a] cat - \\ ^"]
    words = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert words["input_ids"][0].tolist() == [7, 8, 9] + [0] * 9
    assert torch.equal(words["input_ids"], siglip.tokenizer(texts))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pictures = [Image.effect_noise((40, 50), 80).convert("RGB") for _ in range(2)]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = theirs(input_ids=words["input_ids"], pixel_values=pixels)
        images = siglip.encode_images(torch.stack([siglip.preprocess(p) for p in pictures]))
        logits = siglip.logit_scale * images @ siglip.encode_texts(siglip.text_inputs(texts)).mT
    wanted = logits + siglip.clip.logit_bias
    torch.testing.assert_close(found.logits_per_image, wanted, atol=0.05, rtol=0.02)


def test_a_siglip_without_a_tokenizer_of_transformers_is_refused(
    siglip: VisionLanguageModel, tmp_path: Path
) -> None:
    siglip.tokenizer = open_clip.SimpleTokenizer(context_length=12)
    with pytest.raises(InputError, match="--to onnx"):
        export_huggingface(siglip, tmp_path / "out")
    assert not (tmp_path / "out").exists()
