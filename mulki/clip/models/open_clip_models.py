"""Models of open_clip, and checkpoints of ours as its folders."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mulki.clip.models.bundled import BUNDLED
from mulki.clip.models.vision_language import VisionLanguageModel
from mulki.clip.tensor_files import load_tensors
from mulki.errors import InputError, nearest
from mulki.files import check_regular, write_atomic

#: In a published folder, the configuration by which timm makes the image tower.
TRUNK = Path("image_tower", "config.json")
_log = logging.getLogger(__name__)


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
            hub = f"; of the Hugging Face hub it is hf-hub:{given}" if "/" in given else ""
            raise InputError(
                f"--model: no model {given!r}{nearest(name, [*known, BUNDLED])}{hub}; python -c "
                f'"import open_clip; print(open_clip.list_models())" lists them, beside {BUNDLED}'
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        if stand_in:
            pretrained = None
        elif pretrained is None:
            _log.warning("%s starts from random weights; --pretrained gives it trained ones", name)
        elif pretrained not in tags and not Path(pretrained).is_file():
            raise InputError(
                f"--pretrained: {name} has no tag {pretrained!r}{nearest(pretrained, tags)} and "
                f"there is no such file; tags: {', '.join(tags) or 'none'}"
            )
    _check_files(name, pretrained)
    _mend_moved(name)
    # What is loaded by default is read from a hub, for towers that are models of one.
    how = {"load_weights": False, "pretrained_text": False} if stand_in else {}
    try:
        clip, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, weights_only=True, **how
        )
        tokenizer = _tokenizer_like(name, clip) if stand_in else open_clip.get_tokenizer(name)
    except Exception as error:  # a damaged checkpoint or configuration raises whatever it meets
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise InputError(
            f"--model {name} --pretrained {pretrained}: could not be loaded ({reason}); check the "
            f"spelling, the network and that the checkpoint belongs to this model"
        ) from error
    # A local folder has just been read without an error, so its configuration is valid.
    config = {"model_cfg": _architecture(name), "preprocess_cfg": clip.visual.preprocess_cfg}
    trunk = _trunk_of(config["model_cfg"]["vision_cfg"])
    return VisionLanguageModel(clip, tokenizer, preprocess, name, config=config, trunk=trunk)


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
    return dict(json.loads(Path(place, "config.json").read_text(encoding="utf-8")))


def _check_files(name: str, pretrained: str | None) -> None:
    # What open_clip is about to read from this machine, by its checksum if it carries one.
    schema, _, place = name.partition(":")
    files = [Path(pretrained)] if pretrained is not None else []
    if schema == "local-dir":
        files += sorted(Path(place).glob("*.safetensors"))
    for file in files:
        check_regular(file)
        if file.suffix == ".safetensors" and file.is_file():
            load_tensors(file)


def _mend_moved(name: str) -> None:
    """Write the present place of a published checkpoint into its configuration.

    open_clip finds towers that lie in the folder by an absolute path alone, so a folder that was
    moved or copied names its old place.

    Raises:
        InputError: the configuration cannot be written.
    """
    schema, _, given = name.partition(":")
    place = Path(given).resolve()
    path = place / "open_clip_config.json"
    if schema != "local-dir" or not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text, vision = config["model_cfg"]["text_cfg"], config["model_cfg"]["vision_cfg"]
        # As `mulki.train.saving.checkpoints.publish` writes them.
        own_text = (
            text.get("hf_model_pretrained") is False
            and text["hf_model_name"] == text["hf_tokenizer_name"]
            and Path(text["hf_model_name"]).is_absolute()
            and (place / "config.json").is_file()
        )
        own_images = (
            str(vision.get("timm_model_name", "")).startswith("local-dir:")
            and (place / TRUNK).is_file()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # open_clip says what is wrong with it
    before = copy.deepcopy(config)
    if own_text:
        text["hf_model_name"] = text["hf_tokenizer_name"] = str(place)
    if own_images:
        vision["timm_model_name"] = f"local-dir:{(place / TRUNK).parent}"
    if config == before:
        return
    try:
        write_atomic(path, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"--model {name}: its {path.name} names the place it was moved or copied from, and "
            f"cannot be mended ({error.strerror}); make the folder writable, or a copy of it"
        ) from None
    _log.info("%s was moved or copied, and names its new place now", place)


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
    return dict(json.loads(Path(path).read_text(encoding="utf-8"))["model_cfg"])
