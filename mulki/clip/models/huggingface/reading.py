"""A folder that transformers has written, as a model. No network, and nothing but safetensors."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mulki.clip.models.huggingface.architecture import Architecture, architecture_of
from mulki.clip.models.huggingface.names import from_huggingface
from mulki.clip.models.vision_language import VisionLanguageModel
from mulki.clip.offline import offline
from mulki.clip.tensor_files import load_tensors
from mulki.errors import InputError
from mulki.files import check_regular, from_json

#: How `--model` names such a folder.
SCHEMA = "hf-local"

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Words that both vocabularies cut alike if they are one.
_TEXTS = ("a photo of a cat.", "It's 3 o'clock!", "naïve café, 東京", "dog " * 100)
_MEAN_AND_STD = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5,) * 3, (0.5,) * 3),
}
_log = logging.getLogger(__name__)


def load_huggingface(folder: str) -> VisionLanguageModel:
    """The CLIP or SigLIP of `config.json`, `model.safetensors` and a tokenizer's files.

    Args:
        folder: as `save_pretrained` of model and processor leave it.

    Raises:
        InputError: transformers is missing, a file is missing or damaged, or open_clip has no such
            model.
    """
    from importlib.util import find_spec

    path = Path(folder)
    if find_spec("transformers") is None:
        raise InputError(
            f"--model {SCHEMA}:{folder}: needs transformers, not installed here; "
            "pip install 'mulki[export]'"
        )
    try:
        with offline():
            return _load(path)
    except InputError as error:
        raise InputError(
            f"--model {SCHEMA}:{folder}: {error}; pass a folder in which transformers has saved a "
            "CLIP or SigLIP"
        ) from None


def _load(path: Path) -> VisionLanguageModel:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if not path.is_dir():
        raise InputError("no such folder")
    found = architecture_of(_json(path / "config.json"))
    weights = _weights(path)
    tokenizer, named = _tokenizer(path, found)
    found.model["text_cfg"] |= named
    preprocess = PreprocessCfg(**_preprocess(path, found))
    clip = _make(found)
    clip.load_state_dict(from_huggingface(weights, clip.state_dict()))
    from open_clip.model import set_model_preprocess_cfg

    set_model_preprocess_cfg(clip, asdict(preprocess))
    return VisionLanguageModel(
        clip.eval(),
        tokenizer,
        image_transform_v2(preprocess, is_train=False),
        f"{SCHEMA}:{path}",
        config={"model_cfg": found.model, "preprocess_cfg": asdict(preprocess)},
        trunk=found.trunk,
    )


def _make(found: Architecture) -> Any:
    import open_clip

    if found.trunk is None:
        return open_clip.CLIP(**found.model)
    model = {k: v for k, v in found.model.items() if k != "custom_text"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(found.trunk), encoding="utf-8")
        vision = {**model["vision_cfg"], "timm_model_name": f"local-dir:{folder}"}
        try:
            return open_clip.CustomTextCLIP(**{**model, "vision_cfg": vision})
        except Exception as error:  # of a timm that makes no models of folders
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"timm cannot make its image tower ({reason})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        check_regular(path)
        found = from_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        raise InputError(f"it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read ({error})") from None
    return found


def _weights(path: Path) -> dict[str, Tensor]:
    if (path / _WEIGHTS).exists():
        return load_tensors(path / _WEIGHTS)[0]
    if not (path / _INDEX).exists():
        pickled = any(path.glob("pytorch_model*.bin"))
        also = "; pytorch_model.bin is not read, since it could run code" if pickled else ""
        raise InputError(f"it has no {_WEIGHTS}{also}")
    names = _json(path / _INDEX).get("weight_map")
    files = set(names.values()) if isinstance(names, dict) else set()
    if not files or not all(isinstance(f, str) and f == Path(f).name for f in files):
        raise InputError(f"{_INDEX} names no files of this folder")
    found: dict[str, Tensor] = {}
    for file in sorted(files):
        if not (path / file).exists():
            raise InputError(f"it has no {file}, which {_INDEX} names")
        found |= load_tensors(path / file)[0]
    return found


def _tokenizer(path: Path, found: Architecture) -> tuple[Any, dict[str, Any]]:
    # The tokenizer, and what the configuration says of it beside the context length.
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = found.model["text_cfg"]
    length, size = text["context_length"], text["vocab_size"]
    own = SimpleTokenizer(context_length=length)
    like_openai = found.kind == "clip" and size == own.vocab_size
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")
    if not any((path / name).is_file() for name in files):
        if not like_openai:
            raise InputError("it has no files of a tokenizer, such as tokenizer.json")
        _log.warning("%s has no tokenizer; that of OpenAI's CLIP is taken, of the same size", path)
        return own, {}
    try:
        read = HFTokenizer(str(path), context_length=length, trust_remote_code=False)
        largest = max(len(read.tokenizer), 1) - 1
        cut = read(list(_TEXTS))
    except Exception as error:  # whatever damaged files lead to
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"its tokenizer cannot be read ({reason})") from None
    if int(cut.max()) >= size:
        raise InputError(f"its tokenizer has tokens up to {largest}, its model {size} of them")
    end = own.eot_token_id
    if like_openai and all(
        _until(a, end) == _until(b, end)
        for a, b in zip(own(list(_TEXTS)).tolist(), cut.tolist(), strict=True)
    ):
        return own, {}
    # open_clip takes the files that lie beside a configuration with any such name.
    return read, {"hf_tokenizer_name": "local"}


def _until(tokens: list[int], end: int) -> list[int]:
    # What follows the end is padding, and other padding for each tokenizer.
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _preprocess(path: Path, found: Architecture) -> dict[str, Any]:
    from torchvision.transforms.functional import pil_modes_mapping

    size = found.model["vision_cfg"]["image_size"]
    mean, std = _MEAN_AND_STD[found.kind]
    usual: dict[str, Any] = {
        "size": size,
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "resize_mode": "shortest" if found.kind == "clip" else "squash",
    }
    name = "preprocessor_config.json"
    if (path / name).exists():
        given = _json(path / name)
    elif (path / "processor_config.json").exists():
        name = "processor_config.json"
        given = _json(path / name).get("image_processor", {})
    else:
        _log.warning("%s does not say how images are prepared; as usual for %s", path, found.kind)
        return usual
    modes = {mode: way.value for way, mode in pil_modes_mapping.items()}
    try:
        to = given.get("size", {})
        # Before 2023 it was one number.
        to = {"shortest_edge": to} if isinstance(to, int) else dict(to)
        off = [key for key in ("do_resize", "do_normalize") if given.get(key) is False]
        if off or set(to.values()) - {size}:
            raise InputError(
                f"{name} prepares images as no transform of open_clip does "
                f"({', '.join(off) or f'size {to}'}; the model has images of {size})"
            )
        if to:
            usual["resize_mode"] = "shortest" if "shortest_edge" in to else "squash"
        return usual | {
            "mean": tuple(map(float, given.get("image_mean", mean))),
            "std": tuple(map(float, given.get("image_std", std))),
            "interpolation": modes[int(given.get("resample", 3))],
        }
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{name} cannot be understood ({type(error).__name__}: {error})") from None
