"""Checkpoints: weights as open_clip reads them, written atomically."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mulki.files import replacing, write_atomic
from mulki.models import VisionLanguageModel

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


def save_weights(
    model: VisionLanguageModel, path: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model's state dict to a safetensors file.

    Args:
        state: as `VisionLanguageModel.checkpoint` returned it; asked for by default.
    """
    with replacing(path) as temporary:
        metadata = {"format": "pt", "model": model.name}
        state = model.checkpoint() if state is None else state
        save_file(dict(state), temporary, metadata=metadata)


def publish(
    model: VisionLanguageModel,
    weights: Path,
    folder: Path,
    whole: Mapping[str, Tensor] | None = None,
) -> None:
    """Make `folder` hold the model so that ``open_clip.create_model("local-dir:...")`` loads it.

    Args:
        weights: the file that `save_weights` made; linked, not copied, where the file system can.
            A model that takes weights from a package gets a file of its own here, with all of
            them, and the configuration of its text tower beside it.
        folder: made if need be. The configuration of such a model names this folder by its
            absolute path, since open_clip resolves a text tower no other way offline.
        whole: the weights for that file, asked for by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = getattr(model.tokenizer, "tokenizer", None)
    if hasattr(tokenizer, "save_pretrained"):  # of a Hugging Face text tower: open_clip looks here
        tokenizer.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    if model.packaged and config is not None:
        model.clip.text.config.save_pretrained(folder)
        text = config["model_cfg"]["text_cfg"]
        text["hf_model_name"] = text["hf_tokenizer_name"] = str(folder.resolve())
        text["hf_model_pretrained"] = False
        whole = model.checkpoint(whole=True) if whole is None else whole
        save_weights(model, folder / WEIGHTS_NAME, whole)
    else:
        with replacing(folder / WEIGHTS_NAME) as temporary:
            try:
                os.link(weights, temporary)
            except OSError:
                shutil.copyfile(weights, temporary)
    if config is not None:
        write_atomic(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
