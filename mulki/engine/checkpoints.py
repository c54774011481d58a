"""Checkpoints: weights as open_clip reads them, written atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mulki.metrics import write_atomic
from mulki.models import VisionLanguageModel

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


def save_weights(model: VisionLanguageModel, path: Path) -> None:
    """Write the model's state dict to a safetensors file."""
    temporary = path.with_suffix(".tmp")
    save_file(model.checkpoint(), temporary, metadata={"format": "pt", "model": model.name})
    os.replace(temporary, path)


def publish(model: VisionLanguageModel, weights: Path, folder: Path) -> None:
    """Make `folder` hold the model in the layout of ``local-dir:``, with these weights.

    The weights are linked, not copied, where the file system can. A model whose configuration is
    not known (loaded from a hub) gets its weights alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.config is not None:
        write_atomic(folder / CONFIG_NAME, json.dumps(model.config, indent=2) + "\n")
    tokenizer: Any = getattr(model.tokenizer, "tokenizer", None)
    if hasattr(tokenizer, "save_pretrained"):  # of a Hugging Face text tower: open_clip looks here
        tokenizer.save_pretrained(folder)
    temporary = folder / "weights.tmp"
    temporary.unlink(missing_ok=True)
    try:
        os.link(weights, temporary)
    except OSError:
        temporary.write_bytes(weights.read_bytes())
    os.replace(temporary, folder / WEIGHTS_NAME)
