"""Checkpoints: weights as open_clip reads them, written atomically."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mulki.files import replacing, sync, temporary_for, write_atomic
from mulki.models import VisionLanguageModel
from mulki.tensor_files import save_tensors

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


def save_weights(
    model: VisionLanguageModel, path: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model's state dict to a safetensors file.

    Args:
        state: from `VisionLanguageModel.checkpoint`, which is called if it is None.
    """
    metadata = {"format": "pt", "model": model.name}
    save_tensors(path, model.checkpoint() if state is None else state, metadata)


def publish(
    model: VisionLanguageModel,
    weights: Path,
    folder: Path,
    whole: Mapping[str, Tensor] | None = None,
) -> None:
    """Make `folder` hold the model so that ``open_clip.create_model("local-dir:...")`` loads it.

    The folder appears whole. Where it holds a model of the same configuration, the weights alone
    are replaced, in one step.

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
    config = copy.deepcopy(model.config)
    if model.packaged and config is not None:
        text = config["model_cfg"]["text_cfg"]
        text["hf_model_name"] = text["hf_tokenizer_name"] = str(folder.resolve())
        text["hf_model_pretrained"] = False
        whole = model.checkpoint(whole=True) if whole is None else whole
    else:
        whole = None
    said = "" if config is None else json.dumps(config, indent=2) + "\n"
    if folder.is_dir() and _reads(folder / CONFIG_NAME) == said:
        _put_weights(model, weights, folder, whole)
        return
    new = temporary_for(folder)
    new.mkdir(parents=True)
    try:
        _put_weights(model, weights, new, whole)
        tokenizer: Any = getattr(model.tokenizer, "tokenizer", None)
        # open_clip looks for the tokenizer of a Hugging Face text tower in this folder.
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(new)
        if whole is not None:
            model.clip.text.config.save_pretrained(new)
        if said:
            write_atomic(new / CONFIG_NAME, said)
        for file in [*new.iterdir(), new]:
            sync(file)
        if folder.exists():  # of another model, or of a run that was killed here
            shutil.rmtree(folder)
        os.replace(new, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _reads(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _put_weights(
    model: VisionLanguageModel, weights: Path, folder: Path, whole: Mapping[str, Tensor] | None
) -> None:
    if whole is not None:
        save_weights(model, folder / WEIGHTS_NAME, whole)
        return
    with replacing(folder / WEIGHTS_NAME) as temporary:
        try:
            os.link(weights, temporary)
        except OSError:
            shutil.copyfile(weights, temporary)
