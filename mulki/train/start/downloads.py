"""What a run would download before its first step, and what stands in for it in a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mulki.clip import models
from mulki.clip.models import VisionLanguageModel
from mulki.clip.offline import offline
from mulki.data.published import Entry
from mulki.errors import InputError
from mulki.train.start.start_model import load_start

# Bytes of a parameter in most published weights.
_FLOAT32 = 4
_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class Download:
    """Something that is not on this machine.

    Attributes:
        what: "weights", "text tower", "tokenizer" or "data set".
        source: where it is, or the name of the data set.
        bytes: its size; None if that is not known.
        estimated: whether the size is that of the parameters in float32.
        by_hand: whether a person has to get it.
    """

    what: str
    source: str
    bytes: int | None = None
    estimated: bool = False
    by_hand: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        size = {"bytes": self.bytes, "estimated": self.estimated}
        return {"what": self.what, "from": self.source, **size, "by_hand": self.by_hand}


class StandIns:
    """What a plan uses in place of data sets and models that are not on this machine.

    Attributes:
        downloads: what was missing.
    """

    def __init__(self) -> None:
        self.downloads: list[Download] = []
        self._first: VisionLanguageModel | None = None
        self._stands_in = False

    def data_set(self, facts: Entry) -> None:
        """Take note of a published data set; see `mulki.data.Source`."""
        size = None if facts.download is None else facts.download.bytes
        self.downloads.append(Download("data set", facts.name, size, by_hand=bool(facts.manual)))

    def model(
        self, name: str, pretrained: str | None = None, *, device: torch.device | str = "cpu"
    ) -> VisionLanguageModel:
        """In place of `load_start`: with random weights where the trained ones are not here.

        A second model, which has to be of the architecture of the first, is a copy of it where
        nothing is known of its own. Where either stands in, both have the same weights.

        Raises:
            InputError: what `mulki.clip.models.load` raises, or nothing is known of a first model.
        """
        architecture, missing = not_here(name, pretrained)
        if not missing:
            model = load_start(name, pretrained, device=device)
        elif architecture is not None:
            model = models.load(architecture, device=device, stand_in=True)
        elif self._first is not None:
            model = replace(self._first, clip=copy.deepcopy(self._first.clip))
        else:
            raise InputError(
                f"--model {name}: not on this machine, and only the hub knows what it is"
            )
        size = _FLOAT32 * sum(p.numel() for p in model.clip.parameters())
        for each in missing:
            sized = replace(each, bytes=size, estimated=True) if each.what == "weights" else each
            if sized not in self.downloads:
                self.downloads.append(sized)
        if self._first is None:
            self._first, self._stands_in = model, bool(missing)
        elif missing or self._stands_in:
            _share_weights(model, self._first)
        return model


def _share_weights(model: VisionLanguageModel, first: VisionLanguageModel) -> None:
    # Random weights of two towers would differ where a run freezes them for both.
    ours, theirs = model.clip.state_dict(), first.clip.state_dict()
    if {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}:
        model.clip.load_state_dict(theirs)


def not_here(name: str, pretrained: str | None) -> tuple[str | None, list[Download]]:
    """What is missing of a model on this machine, without asking any other.

    Args:
        name, pretrained: as of `mulki.clip.models.load`.

    Returns:
        A name by which `models.load` can make the same architecture, None if nothing is known
        of it; and what would be downloaded. That is nothing for names that `load` refuses.
    """
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    from mulki.clip.models.open_clip_models import pretrained_tags

    with offline():
        schema, _, place = name.partition(":")
        missing: list[Download] = []
        architecture: str | None = name
        if schema == "hf-hub" and place:
            config = _or_none(lambda: download_pretrained_from_hf(place, filename=_CONFIG))
            if config is None or _or_none(lambda: download_pretrained_from_hf(place)) is None:
                missing.append(Download("weights", place))
            if config is None:
                architecture = _registered(place)
        else:
            name = architecture = name if place else name.replace("/", "-")
            if name not in open_clip.list_models():
                return name, []
            if pretrained is not None and not Path(pretrained).is_file():
                known = open_clip.get_pretrained_cfg(name, pretrained)
                if not known or pretrained not in pretrained_tags(name):
                    return name, []
                if not _is_here(known):
                    missing.append(Download("weights", str(known.get("hf_hub") or known["url"])))
        if architecture is None:
            return None, missing
        return _with_texts(architecture, missing)


def _with_texts(architecture: str, missing: list[Download]) -> tuple[str | None, list[Download]]:
    # The text tower and the tokenizer may be models of a hub themselves.
    import open_clip

    text = open_clip.get_model_config(architecture)["text_cfg"]
    known: str | None = architecture
    if tower := text.get("hf_model_name"):
        if find_spec("transformers") is None:
            return architecture, missing  # which `load` then says
        from transformers import AutoConfig

        if _or_none(lambda: AutoConfig.from_pretrained(tower)) is None:
            known = None
            missing.append(Download("text tower", tower))
    if _or_none(lambda: open_clip.get_tokenizer(architecture)) is None:
        named = text.get("hf_tokenizer_name") or architecture.partition(":")[2]
        missing.append(Download("tokenizer", named))
    return known, missing


def _registered(place: str) -> str | None:
    # open_clip's own name for the architecture of a repository of the hub.
    import open_clip

    for name, tag in open_clip.list_pretrained():
        hub = str(open_clip.get_pretrained_cfg(name, tag).get("hf_hub") or "")
        if hub.rpartition("/")[0] == place:
            return str(name)
    return None


def _is_here(known: dict[str, Any]) -> bool:
    import open_clip

    if not known.get("hf_hub"):
        # As open_clip looks for it, which would go on with the download.
        return (Path.home() / ".cache" / "clip" / Path(known["url"]).name).is_file()
    return _or_none(lambda: open_clip.download_pretrained(known)) is not None


def _or_none(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except Exception:  # whatever a hub raises without a network
        return None
