"""The data sets of class-incremental work, read from the folders that their archives unpack to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mulki.data.published import Source, entry, published_task
from mulki.data.published.folder_sets import imagenet_names
from mulki.errors import InputError
from tests.data.published.conftest import any_number
from tests.data.published.layouts import colour, jpeg, put


def test_imagenet_names_are_a_thousand_different_ones() -> None:
    names = imagenet_names()
    assert len(names) == len(set(names.values())) == 1000
    assert list(names) == sorted(names)
    assert names["n01440764"] == "tench"
    assert names["n01608432"] == "kite (bird of prey)"


@pytest.mark.parametrize("name", ["tinyimagenet", "cub"])
def test_labels_and_images_belong_together(name: str, data_root: Path) -> None:
    task = published_task(name, Source(data_root, "cil"))
    order = entry(name).class_order or range(200)
    for images in (task.train, task.test):
        assert sorted(images.targets) == list(range(200))
        for index in (0, 77, 199):
            seen = np.asarray(images.load(index))[0, 0].astype(int)
            assert np.abs(seen - colour(order[images.targets[index]])).max() < 6


def test_classes_of_tinyimagenet_are_in_the_published_order(data_root: Path) -> None:
    task = published_task("tinyimagenet", Source(data_root, "cil"))
    assert task.classes[:2] == ("Persian cat", "stick insect")
    assert sorted(task.classes) == sorted(entry("tinyimagenet").classes)


def test_names_of_cub_are_those_of_its_files(data_root: Path) -> None:
    task = published_task("cub", Source(data_root, "cil"))
    assert task.classes[:2] == ("Long billed Bird 0", "Long billed Bird 1")


def test_imagenet_100_takes_the_first_hundred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_number(monkeypatch)
    names = list(imagenet_names().items())
    for split in ("train", "val"):
        for number, (wnid, _) in enumerate(names[:100]):
            put(tmp_path / "imagenet" / split / wnid / "1.JPEG", jpeg(number))
    task = published_task("imagenet100", Source(tmp_path, "cil"))
    assert task.classes[0] == names[68][1]
    assert sorted(task.classes) == sorted(name for _, name in names[:100])
    with pytest.raises(InputError, match="imagenet1k: .*image-net.org"):
        published_task("imagenet1k", Source(tmp_path, "cil"))


def test_imagenet_r_is_split_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    any_number(monkeypatch)
    names = list(imagenet_names().items())[100:300]
    for number, (wnid, _) in enumerate(names):
        put(tmp_path / "imagenet-r" / wnid / "1.jpg", jpeg(number))
    put(tmp_path / "imagenet-r" / "README.txt", "words")
    task = published_task("imagenet-r", Source(tmp_path, "cil"))
    assert task.classes == tuple(name for _, name in names)
    assert (len(task.train), len(task.test)) == (160, 40)
