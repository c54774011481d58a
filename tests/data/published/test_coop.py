"""Splits of CoOp, read from the file that a user has beside the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mulki.data.published import Source, published_task
from mulki.errors import InputError
from tests.data.published.conftest import any_number
from tests.data.published.layouts import jpeg, put

ROWS = {
    "train": [["forest/1.jpg", 0, "Forest"], ["river_1.jpg", 1, "big_river"]],
    "val": [["forest/9.jpg", 0, "Forest"]],
    "test": [["forest/2.jpg", 0, "Forest"]],
}


@pytest.fixture(autouse=True)
def fit(monkeypatch: pytest.MonkeyPatch) -> None:
    any_number(monkeypatch)
    from mulki.data.published import entries, tasks

    real = tasks.entry

    def of_two(name: str) -> entries.Entry:
        facts = real(name)
        object.__setattr__(facts.protocols["coop"], "num_classes", 2)
        return facts

    monkeypatch.setattr(tasks, "entry", of_two)


def write(root: Path, rows: Any = ROWS, images: str = "eurosat/2750", at: str = "eurosat") -> Path:
    for name in ("forest/1.jpg", "forest/2.jpg", "river_1.jpg"):
        put(root / images / name, jpeg(3))
    put(root / at / "split_zhou_EuroSAT.json", rows if isinstance(rows, str) else json.dumps(rows))
    return root


def test_train_and_test_are_those_of_the_file(tmp_path: Path) -> None:
    task = published_task("eurosat", Source(write(tmp_path), "coop"))
    assert task.classes == ("Forest", "big river")
    assert task.templates == ("a centered satellite photo of {}.",)
    assert (list(task.train.targets), list(task.test.targets)) == ([0, 1], [0])
    assert task.train.name(0) == str(tmp_path / "eurosat" / "2750" / "forest" / "1.jpg")


def test_the_file_may_lie_in_the_data_root(tmp_path: Path) -> None:
    assert len(published_task("eurosat", Source(write(tmp_path, at="."), "coop")).train) == 2


def test_images_may_lie_where_torchvision_puts_them(tmp_path: Path) -> None:
    rows = {"train": [["river_1.jpg", 0, "river"], ["forest/1.jpg", 1, "forest"]], "test": []}
    rows["test"] = [["forest/2.jpg", 1, "forest"]]
    put(tmp_path / "dtd" / "split_zhou_DescribableTextures.json", json.dumps(rows))
    for name in ("forest/1.jpg", "forest/2.jpg", "river_1.jpg"):
        put(tmp_path / "dtd" / "dtd" / "images" / name, jpeg(3))
    task = published_task("dtd", Source(tmp_path, "coop"))
    assert task.train.name(0) == str(tmp_path / "dtd/dtd/images/river_1.jpg")


def refused(tmp_path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        published_task("eurosat", Source(write(tmp_path, **options), "coop"))
    return str(caught.value)


def test_a_missing_file_is_named_with_its_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="split_zhou_EuroSAT.json"):
        published_task("eurosat", Source(tmp_path, "coop"))


def test_missing_images_are_named(tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path, images="elsewhere")
    (tmp_path / "eurosat" / "2750").mkdir()
    with pytest.raises(InputError, match=r"2750/forest/1\.jpg"):
        published_task("eurosat", Source(tmp_path, "coop"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("{", "no split of CoOp"),
        ("[]", ""),
        ({"train": []}, "test"),
        ({"train": [["a.jpg", 0]], "test": []}, ""),
        ({"train": [["a.jpg", "x", "b"]], "test": []}, ""),
        ({**ROWS, "test": [["forest/2.jpg", 0, "River"]]}, '"Forest" and "River"'),
        ({**ROWS, "test": [["forest/2.jpg", 5, "x"]]}, "3 classes are not numbered from 0"),
    ],
)
def test_another_content_is_refused(tmp_path: Path, rows: Any, said: str) -> None:
    assert said in refused(tmp_path, rows=rows)
