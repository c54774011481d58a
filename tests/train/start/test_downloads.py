from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest

from mulki.clip.models import VisionLanguageModel
from mulki.data.published import entry
from mulki.errors import InputError
from mulki.train.start import downloads
from mulki.train.start.downloads import Download, StandIns, not_here
from tests.train_helpers import same_state, state_of


def test_what_is_here_is_not_downloaded(tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    file.touch()
    for model, pretrained in (
        ("mulki-mini", None),
        ("ViT-B-32", None),
        ("ViT-B-32", str(file)),
        (f"local-dir:{tmp_path}", None),
        # What `load` refuses.
        ("ViT-B-32", "no-such-tag"),
        ("no-such-model", "openai"),
        ("hf-hub:", None),
    ):
        assert not_here(model, pretrained) == (model, [])


def far(*_: object, **__: object) -> Any:
    raise OSError("no network")


def test_a_tag_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def missing(known: object) -> str:
        from huggingface_hub import constants

        seen.append(constants.HF_HUB_OFFLINE)
        raise FileNotFoundError

    monkeypatch.setattr(open_clip, "download_pretrained", missing)
    known = open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")
    wanted = [Download("weights", known["hf_hub"])]
    assert not_here("ViT-B/32", "laion2b_s34b_b79k") == ("ViT-B-32", wanted)
    assert seen == [True]
    monkeypatch.setattr(open_clip, "download_pretrained", lambda known: "a file")
    assert not_here("ViT-B/32", "laion2b_s34b_b79k") == ("ViT-B-32", [])


def test_an_address_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = "https://example.org/weights/some.pt"
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: {"url": address})
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    tag = "laion2b_e16"
    assert not_here("ViT-B-32", tag)[1] == [Download("weights", address)]
    cache = tmp_path / ".cache" / "clip"
    cache.mkdir(parents=True)
    (cache / "some.pt").touch()
    assert not_here("ViT-B-32", tag)[1] == []
    assert not_here("ViT-B-32", "openai") == ("ViT-B-32", [])  # QuickGELU, which `load` refuses


def test_of_a_repository_the_architecture_may_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", far)
    place = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert not_here(f"hf-hub:{place}", None) == ("ViT-B-32", [Download("weights", place)])
    unknown = [Download("weights", "no-such-owner/no-such-model")]
    assert not_here("hf-hub:no-such-owner/no-such-model", None) == (None, unknown)


def test_a_tokenizer_and_a_text_tower_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(open_clip, "get_tokenizer", far)
    tokenizer = Download("tokenizer", "timm/ViT-B-16-SigLIP")
    assert not_here("ViT-B-16-SigLIP", None) == ("ViT-B-16-SigLIP", [tokenizer])
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", far)
    both = [Download("text tower", "roberta-base"), Download("tokenizer", "roberta-base")]
    assert not_here("roberta-ViT-B-32", None) == (None, both)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: "a configuration")
    assert not_here("roberta-ViT-B-32", None) == ("roberta-ViT-B-32", both[1:])
    # Without transformers `load` says what is missing.
    monkeypatch.setattr(downloads, "find_spec", lambda name: None)
    assert not_here("roberta-ViT-B-32", None) == ("roberta-ViT-B-32", [])


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str | None, list[Download]]]:
    """What is missing of models by name; nothing of others."""
    found: dict[str, tuple[str | None, list[Download]]] = {}
    monkeypatch.setattr(downloads, "not_here", lambda name, tag: found.get(name, (name, [])))
    return found


def test_random_weights_stand_in(
    known: dict[str, Any], load_tiny: Callable[..., VisionLanguageModel]
) -> None:
    missing = [Download("weights", "hub"), Download("tokenizer", "hub")]
    known |= {"far": ("tiny-vit", missing), "farther": (None, [Download("weights", "other")])}
    stand_ins = StandIns()
    model = stand_ins.model("far", "tag")
    size = 4 * sum(p.numel() for p in load_tiny().clip.parameters())
    assert stand_ins.downloads == [Download("weights", "hub", size, True), missing[1]]
    for name in ("far", "farther", "tiny-vit"):
        other = stand_ins.model(name)
        assert other.clip is not model.clip and same_state(state_of(other), state_of(model))
    assert stand_ins.downloads[2:] == [Download("weights", "other", size, True)]
    # Of another architecture: the run says so.
    assert state_of(stand_ins.model("tiny-resnet")).keys() != state_of(model).keys()


def test_what_is_here_is_loaded(known: dict[str, Any], tiny_models: tuple[str, ...]) -> None:
    stand_ins = StandIns()
    first, second = stand_ins.model("tiny-vit"), stand_ins.model("tiny-vit", device="cpu")
    assert not same_state(state_of(first), state_of(second)) and stand_ins.downloads == []
    known["far"] = (None, [Download("weights", "hub")])
    assert same_state(state_of(stand_ins.model("far")), state_of(first))
    with pytest.raises(InputError, match="--model far: not on this machine"):
        StandIns().model("far")


def test_data_sets_are_noted() -> None:
    stand_ins = StandIns()
    for name in ("dtd", "sun397"):
        stand_ins.data_set(entry(name))
    first, second = (each.to_dict() for each in stand_ins.downloads)
    assert first == {
        "what": "data set",
        "from": "dtd",
        "bytes": 625239812,
        "estimated": False,
        "by_hand": False,
    }
    assert second["by_hand"] and second["bytes"] > 3e10
