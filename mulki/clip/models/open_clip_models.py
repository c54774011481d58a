"""Models of open_clip, and checkpoints of ours as its folders."""

from __future__ import annotations

import contextlib
import logging
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mulki.clip.models.bundled import BUNDLED
from mulki.clip.models.vision_language import VisionLanguageModel
from mulki.clip.tensor_files import check_floats, load_tensors, read_metadata
from mulki.errors import InputError, nearest
from mulki.files import check_regular, check_zip, from_json

#: In place of a tag: no weights.
RANDOM = "none"
#: In a published folder, the configuration by which timm makes the image tower.
TRUNK = Path("image_tower", "config.json")
#: In the metadata of weights, how their model wants its images, as JSON.
PREPROCESS = "preprocess_cfg"
# Of it, and of a tag, what the loaded model takes.
_IMAGES = ("mean", "std", "interpolation", "resize_mode")
_log = logging.getLogger(__name__)

# Letters of what another package says of an error.
_LONGEST_REASON = 300


def pretrained_tags(name: str) -> list[str]:
    """Tags of the weights that were trained with the activation that a model of open_clip has.

    open_clip lists those with QuickGELU under the plain name too, and only warns of them.
    """
    import open_clip

    other = open_clip.list_pretrained_tags_by_model(_quick(name))
    return [tag for tag in open_clip.list_pretrained_tags_by_model(name) if tag not in other]


def trained_one(name: str) -> tuple[str, str] | None:
    """A model of open_clip with this architecture, and a tag of its weights; None without any."""
    for each in (name, _quick(name)):
        if tags := pretrained_tags(each):
            return each, tags[0]
    return None


def _quick(name: str) -> str:
    return f"{name}-quickgelu"


def load_open_clip(
    name: str, pretrained: str | None, *, stand_in: bool = False
) -> VisionLanguageModel:
    """A model that open_clip knows by its name, or reads from a folder or a hub.

    Args:
        name, pretrained, stand_in: as of `mulki.clip.models.load`.

    Raises:
        InputError: as `mulki.clip.models.load` does.
    """
    import open_clip

    if ":" not in name:
        given, name = name, name.replace("/", "-")
        known = open_clip.list_models()
        if name not in known:
            hub = f"; no such folder; of the hub it is hf-hub:{given}" if "/" in given else ""
            raise InputError(
                f"--model: no model {given!r}{nearest(name, [*known, BUNDLED])}{hub}; python -c "
                f'"import open_clip; print(open_clip.list_models())" lists them, beside {BUNDLED}'
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if stand_in or pretrained == RANDOM:
            pretrained = None
        elif pretrained is None:
            _log.warning("%s starts from random weights; --pretrained gives it trained ones", name)
        elif pretrained in tags and pretrained not in pretrained_tags(name):
            raise InputError(
                f"--pretrained: the weights {pretrained} of {name} were trained with QuickGELU, "
                f"which that model does not have; pass --model {_quick(name)}"
            )
        elif pretrained not in tags and not Path(pretrained).is_file():
            raise InputError(
                f"--pretrained: {name} has no tag {pretrained!r}{nearest(pretrained, tags)} and "
                f"there is no such file; tags: {', '.join(tags) or 'none'}"
            )
    whole = _check_files(name, pretrained)
    # What is loaded by default is read from a hub, for towers that are models of one.
    how: dict[str, Any] = (
        {"load_weights": False, "pretrained_text": False}
        if stand_in
        else {"require_pretrained": ":" in name}  # without it, random ones where there are none
    )
    try:
        towers = _towers_here(name)
        how |= _images_of(name, pretrained)
        clip, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, weights_only=True, **how, **towers
        )
        check_floats(whole, clip.state_dict())
        tokenizer = _tokenizer_like(name, clip) if stand_in else open_clip.get_tokenizer(name)
    except Exception as error:  # a damaged checkpoint or configuration raises whatever it meets
        raise InputError(
            f"--model {name} --pretrained {pretrained}: could not be loaded ({_reason(error)}); "
            "check the spelling, the network and that the checkpoint belongs to this model"
        ) from error
    # A local folder has just been read without an error, so its configuration is valid.
    config = {
        "model_cfg": _architecture(name) | towers,
        "preprocess_cfg": clip.visual.preprocess_cfg,
    }
    trunk = _trunk_of(config["model_cfg"]["vision_cfg"])
    return VisionLanguageModel(clip, tokenizer, preprocess, name, config=config, trunk=trunk)


def _reason(error: Exception) -> str:
    # In one line, of whole sentences where it is long.
    text = " ".join((str(error) or type(error).__name__).split())
    if len(text) <= _LONGEST_REASON:
        return text
    whole = text[:_LONGEST_REASON].rpartition(". ")[0]
    return f"{whole}." if whole else f"{text[:_LONGEST_REASON].rpartition(' ')[0]} ..."


def _tokenizer_like(name: str, clip: Any) -> Callable[[Sequence[str]], Tensor]:
    # That of the model, or another one whose results have its length and range.
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except Exception:  # whatever a hub raises without a network
        text = _architecture(name)["text_cfg"]
        tower = getattr(clip, "text", clip)
        length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
        other = open_clip.SimpleTokenizer(context_length=length)
        return lambda texts: other(texts).clamp(max=tower.vocab_size - 1)


def _trunk_of(vision: dict[str, Any]) -> dict[str, Any] | None:
    # The image tower that timm has just made of a folder; its place is left out of `vision`.
    schema, _, place = str(vision.get("timm_model_name", "")).partition(":")
    if schema != "local-dir":
        return None
    del vision["timm_model_name"]
    return dict(from_json(Path(place, "config.json").read_text(encoding="utf-8")))


def _check_files(name: str, pretrained: str | None) -> dict[str, Tensor]:
    # What open_clip is about to read from this machine, by its checksum if it carries one; returns
    # what is no floating point number there, on meta.
    schema, _, place = name.partition(":")
    files = [Path(pretrained)] if pretrained is not None else []
    whole: dict[str, Tensor] = {}
    if schema == "local-dir":
        files += sorted(Path(place).glob("*.safetensors"))
    for file in files:
        check_regular(file)
        with contextlib.suppress(OSError, zipfile.BadZipFile):  # open_clip says what is wrong
            check_zip(file)
        if file.suffix == ".safetensors" and file.is_file():
            read, _ = load_tensors(file)
            whole |= {n: v.to("meta") for n, v in read.items() if not v.is_floating_point()}
    return whole


def _images_of(name: str, pretrained: str | None) -> dict[str, Any]:
    # Of a tag open_clip knows how its model wants images; a file of ours says it. Another file is
    # most often the download of a tag.
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None or pretrained in tags or not Path(pretrained).is_file():
        return {}
    metadata = read_metadata(pretrained) if pretrained.endswith(".safetensors") else {}
    other = metadata.get("model", "").replace("/", "-")
    if other != name and other in [*open_clip.list_models(), BUNDLED]:
        raise InputError(f"{pretrained} is of {other}")
    said = from_json(metadata[PREPROCESS]) if PREPROCESS in metadata else _images_of_tags(name)
    return {f"image_{each}": said[each] for each in _IMAGES if each in said}


def _images_of_tags(name: str) -> dict[str, Any]:
    # What most tags of the model have, the first of those with as many.
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [
        {k: v for k, v in get_pretrained_cfg(name, tag).items() if k in _IMAGES} for tag in tags
    ]
    if not known:
        return {}
    most = max(known, key=known.count)
    if known.count(most) < len(known):
        _log.warning("%s", f"{name}: its tags differ in how they want images; taken is {most}")
    return most


def _towers_here(name: str) -> dict[str, Any]:
    """The towers of a published checkpoint, as its configuration would name them where it lies now.

    `mulki.train.saving.checkpoints.publish` writes their absolute path, as open_clip wants it; that
    of a folder that was moved or copied is the old one.
    """
    schema, _, given = name.partition(":")
    place = Path(given).resolve()
    path = place / "open_clip_config.json"
    if schema != "local-dir" or not path.is_file():
        return {}  # open_clip says what is missing
    config = from_json(path.read_text(encoding="utf-8"))["model_cfg"]
    text, vision, found = config["text_cfg"], config["vision_cfg"], {}
    absolute = Path(text.get("hf_model_name", "")).is_absolute()
    if absolute and text.get("hf_model_pretrained") is False and (place / "config.json").is_file():
        found["text_cfg"] = {**text, "hf_model_name": str(place), "hf_tokenizer_name": str(place)}
    if vision.get("timm_model_name", "").startswith("local-dir:") and (place / TRUNK).is_file():
        tower = f"local-dir:{(place / TRUNK).parent}"
        found["vision_cfg"] = {**vision, "timm_model_name": tower, "timm_model_pretrained": False}
    return found


def _architecture(name: str) -> dict[str, Any]:
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    schema, colon, place = name.partition(":")
    if not colon:
        return dict(open_clip.get_model_config(name))
    file = "open_clip_config.json"
    # A hub model has just been loaded, so this finds the file in the cache.
    path = (
        place + "/" + file
        if schema == "local-dir"
        else download_pretrained_from_hf(place, filename=file)
    )
    return dict(from_json(Path(path).read_text(encoding="utf-8"))["model_cfg"])
