"""Folders with tiny models, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

_TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ("<pad>", "<unk>", "a", "photo", "of", "cat", "dog", "two", "dogs", "red", "its", "3")


def clip_model(**changes: Any) -> Any:
    """A `CLIPModel` with weights that are far from zero."""
    text = {"hidden_size": 16, "intermediate_size": 40, "vocab_size": 49408}
    text |= {"max_position_embeddings": 16, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {"hidden_size": 32, "intermediate_size": 64, "image_size": 32, "patch_size": 16}
    return _random(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**text, **_TOWER, **changes.get("text", {})},
                vision_config={**vision, **_TOWER, **changes.get("vision", {})},
                projection_dim=24,
            )
        )
    )


def siglip_model(**changes: Any) -> Any:
    """A `SiglipModel`, likewise; the inner width of its images is no multiple of their width."""
    text = {"hidden_size": 16, "intermediate_size": 40, "vocab_size": len(WORDS)}
    text |= {"max_position_embeddings": 12, "projection_size": 24}
    vision = {"hidden_size": 24, "intermediate_size": 43, "image_size": 32, "patch_size": 16}
    return _random(
        transformers.SiglipModel(
            transformers.SiglipConfig(
                text_config={**text, **_TOWER, **changes.get("text", {})},
                vision_config={**vision, **_TOWER, **changes.get("vision", {})},
            )
        )
    )


def _random(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tokenizer_of_words() -> Any:
    """A fast tokenizer of a few words, padded at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>"
    )


def saved(model: Any, folder: Path, tokenizer: Any = None, processor: Any = None) -> Path:
    """The folder with what is given."""
    for each in (model, tokenizer, processor):
        if each is not None:
            each.save_pretrained(folder)
    return folder


def of_transformers(model: Any, pixels: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Unit features of images and of texts, by transformers itself."""
    with torch.no_grad():
        out = model(pixel_values=pixels, input_ids=tokens)
    return [torch.nn.functional.normalize(x, dim=1) for x in (out.image_embeds, out.text_embeds)]
