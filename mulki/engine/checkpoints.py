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
        state: from `VisionLanguageModel.checkpoint`, which is called if it is None.
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
        weights: the file that `save_weights` made. It is linked if the file system can do that,
            else copied. For a model that takes weights from a package, another file with all
            weights is written, and the configuration of its text tower beside it.
        folder: made if it does not exist. The configuration of a model with a packaged text tower
            holds the absolute path of this folder, since open_clip finds such a text tower offline
            in no other way.
        whole: all weights for that file, from `VisionLanguageModel.checkpoint(whole=True)`, which
            is called if it is None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = getattr(model.tokenizer, "tokenizer", None)
    # open_clip looks for the tokenizer of a Hugging Face text tower in this folder.
    if hasattr(tokenizer, "save_pretrained"):
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
