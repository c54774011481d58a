from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest

from mulki.train.config.run_config import resolve
from mulki.train.start.requirements import missing


def of(**options: Any) -> list[str]:
    return missing(resolve(options))


def test_a_run_that_has_all_lacks_nothing(task_folders: tuple[str, str], tmp_path: Path) -> None:
    assert of() == []
    assert of(tasks=task_folders, method="snd", reference=str(tmp_path)) == []
    (tmp_path / "w.pt").touch()
    own = {"model": "ViT-B-16", "pretrained": str(tmp_path / "w.pt")}
    assert of(tasks=task_folders, method="zscl", reference="current", **own) == []


def test_all_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(config: dict[str, Any], **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    model = {"model": "ViT-B/16-quickgelu", "pretrained": "openai"}
    data, weights, reference = of(
        tasks=("none",), method="zscl", reference=str(tmp_path / "none"), **model
    )
    assert data.startswith("none: neither a sequence")
    assert "ViT-B/16-quickgelu --pretrained openai: not on this machine" in weights
    assert reference.startswith("--reference: ") and "does not exist" in reference
    # A line for each data set.
    lines = of(tasks=("mtil",), order="II", data_root=str(tmp_path), method="finetune")
    assert [line.split(":")[0] for line in lines[:3]] == ["stanfordcars", "food", "mnist"]
    assert len(lines) == 11
    (line,) = of(tasks=("mtil",), data_root=str(tmp_path / "none"))
    assert line.startswith("--data-root: ") and "is not a folder" in line


def test_weights_that_are_there_are_not_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(tmp_path))
    assert of(model="ViT-B-16-quickgelu", pretrained="openai") == []
