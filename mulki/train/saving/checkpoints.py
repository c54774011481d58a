"""Checkpoints: weights as open_clip reads them, written atomically, and read again."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mulki.clip import models
from mulki.clip.models import PREPROCESS, TRUNK, VisionLanguageModel
from mulki.clip.tensor_files import check_floats, load_tensors, read_metadata, save_tensors
from mulki.errors import InputError
from mulki.files import new_folder, replacing, write_atomic
from mulki.train.saving.description import CARD, KEY, Description, described

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
# In the folder of a run.
LATEST = Path("checkpoints", "latest")
ARGUMENTS = "args.yaml"


def save_weights(
    model: VisionLanguageModel,
    path: Path,
    state: Mapping[str, Tensor] | None = None,
    description: Description | None = None,
) -> None:
    """Write the model's state dict to a safetensors file.

    Args:
        state: from `VisionLanguageModel.checkpoint`, which is called if it is None.
        description: kept in its metadata.
    """
    metadata = {"format": "pt", "model": model.name}
    metadata[PREPROCESS] = json.dumps(model.clip.visual.preprocess_cfg)
    if description is not None:
        metadata |= description.to_metadata()
    save_tensors(path, model.checkpoint() if state is None else state, metadata)


def publish(
    model: VisionLanguageModel,
    weights: Path,
    folder: Path,
    whole: Mapping[str, Tensor] | None = None,
    description: Description | None = None,
) -> None:
    """Make `folder` hold the model so that ``open_clip.create_model("local-dir:...")`` loads it.

    The folder appears whole. Where it holds a model of the same configuration, the weights, which
    hold the description, are replaced in one step, and after them the model card.

    Args:
        weights: the file that `save_weights` made. It is linked if the file system can do that,
            else copied. For a model that takes weights from a package, another file with all
            weights is written, and the configuration of its text tower beside it.
        folder: made if it does not exist. The configuration of a model with a packaged text tower
            holds the absolute path of this folder, since open_clip finds such a text tower offline
            in no other way.
        whole: all weights for that file, from `VisionLanguageModel.checkpoint(whole=True)`, which
            is called if it is None.
        description: as `save_weights` got it; makes the model card.
    """
    config = copy.deepcopy(model.config)
    if model.packaged and config is not None:
        text = config["model_cfg"]["text_cfg"]
        text["hf_model_name"] = text["hf_tokenizer_name"] = str(folder.resolve())
        text["hf_model_pretrained"] = False
        whole = model.checkpoint(whole=True) if whole is None else whole
    else:
        whole = None
    if model.trunk is not None and config is not None:
        place = (folder.resolve() / TRUNK).parent
        config["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{place}"
    said = "" if config is None else json.dumps(config, indent=2) + "\n"
    if folder.is_dir() and _reads(folder / CONFIG_NAME) == said:
        _put_weights(model, weights, folder, whole, description)
        return
    # What is there now is of another model, or of a run that was killed here.
    with new_folder(folder) as new:
        _put_weights(model, weights, new, whole, description)
        tokenizer: Any = getattr(model.tokenizer, "tokenizer", None)
        # open_clip looks for the tokenizer of a Hugging Face text tower in this folder.
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(new)
        if whole is not None:
            model.clip.text.config.save_pretrained(new)
        if model.trunk is not None:
            (new / TRUNK).parent.mkdir()
            write_atomic(new / TRUNK, json.dumps(model.trunk, indent=2) + "\n")
        if said:
            write_atomic(new / CONFIG_NAME, said)


def _reads(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _put_weights(
    model: VisionLanguageModel,
    weights: Path,
    folder: Path,
    whole: Mapping[str, Tensor] | None,
    description: Description | None,
) -> None:
    with replacing(folder / WEIGHTS_NAME) as temporary:
        if whole is not None:
            save_weights(model, temporary, whole, description)
        else:
            try:
                os.link(weights, temporary)
            except OSError:
                shutil.copyfile(weights, temporary)
        # If the process ends now, what is beside a model is missing, and is not of an earlier one.
        for beside in (statistics_of, kept_of, adapters_of):
            beside(folder).unlink(missing_ok=True)
    if description is not None:
        write_atomic(
            folder / CARD, description.card(moves=model.trunk is None and not model.packaged)
        )


def _beside(checkpoint: Path, name: str) -> Path:
    weights = weights_of(checkpoint)
    own = weights.name == WEIGHTS_NAME
    return weights.with_name(name if own else f"{Path(name).stem}_{weights.name}")


def statistics_of(checkpoint: Path) -> Path:
    """The file of class statistics that belongs to a checkpoint, a folder or a file of weights."""
    return _beside(checkpoint, "class_statistics.safetensors")


def kept_of(checkpoint: Path) -> Path:
    """The file of what a method keeps, see `mulki.methods.Method.kept`; as `statistics_of`."""
    return _beside(checkpoint, "method.safetensors")


def adapters_of(checkpoint: Path) -> Path:
    """The file of the adapters that are merged in a checkpoint; as `statistics_of`."""
    return _beside(checkpoint, "adapters.safetensors")


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that is given, or that a checkpoint lies in; None if there is none."""
    for folder in (checkpoint, checkpoint.absolute().parent.parent):
        if (folder / ARGUMENTS).is_file() and (folder / LATEST.parent).is_dir():
            return folder
    return None


def weights_of(path: Path) -> Path:
    """The file of weights of a checkpoint, which need not be there.

    Args:
        path: as of `load_checkpoint`.
    """
    if not path.is_dir():
        return path
    return (path / LATEST if run_of(path) == path else path) / WEIGHTS_NAME


def description_of(path: Path) -> Description | None:
    """What a checkpoint says of itself; None where another program has written it.

    Args:
        path: as of `load_checkpoint`.

    Raises:
        InputError: no such file or folder, or a damaged file.
    """
    file = weights_of(path)
    if file.suffix != ".safetensors" or not file.exists():
        return None  # `load_checkpoint` says what is wrong
    text = read_metadata(file).get(KEY)
    return None if text is None else described(text, str(file))


def load_checkpoint(
    path: Path, model: str | None = None, *, device: torch.device | str = "cpu"
) -> VisionLanguageModel:
    """Load what a run has saved, or another model that open_clip reads from a folder or file.

    Args:
        path: the folder of a run, of which the last model is taken; a folder with a configuration
            of open_clip, as ``checkpoints/latest``; or a file of weights.
        model: of a file of weights, if the file does not say it, as those of mulki do.
        device: where it goes.

    Raises:
        InputError: no such file or folder, a file that does not say its model, weights of another
            model, or what `mulki.clip.models.load` raises.
    """
    if path.is_dir():
        folder = weights_of(path).parent
        if not (folder / CONFIG_NAME).is_file():
            raise InputError(
                f"{path}: no {CONFIG_NAME} in {folder}; pass a checkpoint, a folder with one, or "
                "the folder of a run that has learned a task"
            )
        if model is not None:
            raise InputError(f"--model: {path} brings its own configuration; leave {model} out")
        return models.load(f"local-dir:{folder}", device=device)
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; pass a checkpoint, such as logs/NAME/checkpoints/"
            "latest, or the folder of a run"
        )
    state: dict[str, Tensor] | None = None
    if path.suffix == ".safetensors":
        state, metadata = load_tensors(path)
        model = model or metadata.get("model")
    if model is None:
        raise InputError(f"{path}: does not say of which model its weights are; pass --model")
    if ":" not in model or state is None:
        return models.load(model, str(path), device=device)
    # The run began with a model that is known by its place, which may be on another machine.
    beside = path.parent / LATEST.name
    place = f"local-dir:{beside}" if (beside / CONFIG_NAME).is_file() else model
    loaded = models.load(place, device=device)
    try:
        check_floats(state, loaded.clip.state_dict())
        loaded.clip.load_state_dict(state)
    except (InputError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: does not hold the weights of {place} ({reason}); pass a checkpoint of it"
        ) from None
    return loaded
