from __future__ import annotations

from pathlib import Path

import open_clip
import pytest

from mulki.engine.downloads import weights_to_download
from mulki.errors import InputError


def test_what_is_here_is_not_downloaded(tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    file.touch()
    for model, pretrained in (
        ("mulki-mini", None),
        ("ViT-B-32", None),
        ("ViT-B-32", str(file)),
        ("ViT-B-32", "no-such-tag"),
        (f"local-dir:{tmp_path}", None),
    ):
        assert weights_to_download(model, pretrained) == ""


def test_a_tag_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    seen: list[bool] = []

    def missing(known: object) -> str:
        from huggingface_hub import constants

        seen.append(constants.HF_HUB_OFFLINE)
        raise FileNotFoundError

    monkeypatch.setattr(open_clip, "download_pretrained", missing)
    known = open_clip.get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")
    assert weights_to_download("ViT-B/32", "laion2b_s34b_b79k") == known["hf_hub"]
    assert seen == [True]
    monkeypatch.setattr(open_clip, "download_pretrained", lambda known: "a file")
    assert weights_to_download("ViT-B/32", "laion2b_s34b_b79k") == ""


def test_an_address_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = "https://example.org/weights/some.pt"
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: {"url": address})
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert weights_to_download("ViT-B-32", "tag") == address
    cache = tmp_path / ".cache" / "clip"
    cache.mkdir(parents=True)
    (cache / "some.pt").touch()
    assert weights_to_download("ViT-B-32", "tag") == ""


def test_of_a_model_that_is_only_on_a_hub_nothing_can_be_said() -> None:
    with pytest.raises(InputError, match="not on this machine.*download it first"):
        weights_to_download("hf-hub:no-such-owner/no-such-model", None)
