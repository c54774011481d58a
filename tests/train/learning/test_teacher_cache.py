from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.distributed.world import ALONE, World
from mulki.errors import InputError
from mulki.train.learning.teacher_cache import TeacherCache

MODEL = {"weights": "a", "architecture": "vit", "precision": "fp32"}
TEXTS = {"texts": ["a cat", "a dog"]}
FEATURES = torch.arange(6.0).view(2, 3)


def cache(folder: Path, **model: str) -> TeacherCache:
    return TeacherCache(folder, MODEL | model, ALONE, torch.device("cpu"))


def never() -> Tensor:
    raise AssertionError("encoded again")


def test_features_are_encoded_once(tmp_path: Path) -> None:
    folder = tmp_path / "kept" / "here"
    assert cache(folder).features(TEXTS, lambda: FEATURES).equal(FEATURES)
    assert cache(folder).features(TEXTS, never).equal(FEATURES)


def test_a_file_is_mapped_into_memory(tmp_path: Path) -> None:
    big = torch.randn(2**12, 2**10)
    found = cache(tmp_path).features(TEXTS, lambda: big)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("Linux")
    (file,) = tmp_path.iterdir()
    assert str(file) in maps.read_text() and found.equal(big)


@pytest.mark.parametrize("differs", ["weights", "architecture", "precision"])
def test_another_model_has_files_of_its_own(tmp_path: Path, differs: str) -> None:
    cache(tmp_path).features(TEXTS, lambda: FEATURES)
    other = cache(tmp_path, **{differs: "other"}).features(TEXTS, lambda: 2 * FEATURES)
    assert other.equal(2 * FEATURES) and cache(tmp_path).features(TEXTS, never).equal(FEATURES)


def test_other_texts_have_a_file_of_their_own(tmp_path: Path) -> None:
    cache(tmp_path).features(TEXTS, lambda: FEATURES)
    assert (
        cache(tmp_path).features({"texts": ["a ca", "ta dog"]}, lambda: -FEATURES).equal(-FEATURES)
    )
    assert len([*tmp_path.iterdir()]) == 2


def test_a_file_that_two_runs_write_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other() -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: 1)
            cache(tmp_path).features(TEXTS, lambda: FEATURES)
        return FEATURES

    assert cache(tmp_path).features(TEXTS, other).equal(FEATURES)
    assert len([*tmp_path.iterdir()]) == 1


def test_processes_that_read_different_files(tmp_path: Path) -> None:
    told: dict[str, object] = {}

    class Two(World):
        def agree(self, device: torch.device, problem: Any, **facts: object) -> None:
            told.update(facts)

    TeacherCache(tmp_path, MODEL, Two(), torch.device("cpu")).features(TEXTS, lambda: FEATURES)
    assert len(str(told["features of --teacher-cache (hash)"])) == 64


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cache(tmp_path).features(TEXTS, lambda: FEATURES)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        InputError, match=f"^--teacher-cache: {re.escape(str(file))}: damaged.*again"
    ):
        cache(tmp_path).features(TEXTS, never)


@pytest.mark.parametrize("differs", ["weights", "architecture", "precision"])
def test_a_file_under_the_name_of_another_is_refused(tmp_path: Path, differs: str) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    cache(one).features(TEXTS, lambda: FEATURES)
    cache(other, **{differs: "b"}).features(TEXTS, lambda: FEATURES)
    (of_one,), (of_other,) = one.iterdir(), other.iterdir()
    shutil.copy(of_one, of_other)
    with pytest.raises(InputError, match=f"is of another {differs} .*remove it"):
        cache(other, **{differs: "b"}).features(TEXTS, never)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^--teacher-cache: cannot make the folder .*file"):
        cache(tmp_path / "file")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    gone = cache(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(InputError, match="^--teacher-cache: cannot write .*No such file"):
        gone.features(TEXTS, lambda: FEATURES)
