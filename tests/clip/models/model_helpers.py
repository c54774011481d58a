"""What the tests of models share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mulki.clip.models import VisionLanguageModel
from tests.train_helpers import ARCHITECTURES

Load = Callable[..., VisionLanguageModel]
PROMPTS = ["a photo of a cat.", "a drawing of two dogs.", "grass"]


def hf_architecture(text_tower: str) -> dict[str, Any]:
    return {
        "embed_dim": 16,
        "vision_cfg": ARCHITECTURES["tiny-vit"]["vision_cfg"],
        "text_cfg": {
            "hf_model_name": text_tower,
            "hf_tokenizer_name": text_tower,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": 16,
        },
    }


def encoded(model: VisionLanguageModel) -> torch.Tensor:
    """Text features as open_clip alone computes them."""
    with torch.no_grad():
        return F.normalize(model.clip.encode_text(model.tokenizer(PROMPTS)), dim=-1)


def bad_checkpoint(tmp_path: Path, content: bytes | dict[str, torch.Tensor]) -> str:
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    return str(path)
