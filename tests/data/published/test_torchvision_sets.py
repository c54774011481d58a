"""Each data set of MTIL, read from the files that torchvision downloads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from mulki.data.published import Source, entry, published_task
from mulki.data.published.prepare import downloadable
from mulki.data.published.torchvision_sets import READERS, dataset, pairs_of
from tests.data.published.layouts import colour

# Images of the tiny copies, [train, test].
NUMBERS = {
    "aircraft": (100, 100),
    "caltech101": (161, 41),
    "cifar100": (100, 100),
    "dtd": (47, 47),
    "eurosat": (40, 10),
    "flowers": (102, 102),
    "food": (101, 101),
    "mnist": (10, 10),
    "oxfordpet": (37, 37),
    "stanfordcars": (196, 196),
    "sun397": (635, 159),
}


@pytest.mark.parametrize("name", sorted(READERS))
def test_names_labels_and_images_belong_together(name: str, zscl: Source) -> None:
    task = published_task(name, zscl)
    assert task.classes == entry(name).classes
    assert (len(task.train), len(task.test)) == NUMBERS[name]
    for images in (task.train, task.test):
        for index in {0, len(images) // 2, len(images) - 1}:
            target = images.targets[index]
            seen = np.asarray(images.load(index))[0, 0]
            wanted = (20 * target,) * 3 if name == "mnist" else colour(target)
            assert np.abs(seen.astype(int) - wanted).max() < 6  # JPEG rounds


@pytest.mark.parametrize("name", ["dtd", "food", "oxfordpet", "sun397"])
def test_files_lie_in_folders_of_their_class(name: str, zscl: Source) -> None:
    task = published_task(name, zscl)
    for index in range(len(task.train)):
        path = Path(task.train.name(index))
        folder = path.stem if name == "oxfordpet" else path.parent.name
        if name == "sun397":  # SUN397/s/synagogue/outdoor
            folder = path.parent.as_posix().partition("/SUN397/")[2][2:]
        written = re.sub(r"_\d+$", "", folder).replace("_", " ")
        assert written == task.classes[task.train.targets[index]]


@pytest.mark.parametrize("name", ["caltech101", "eurosat", "sun397"])
def test_a_random_split_is_that_of_torch_on_sorted_files(name: str, zscl: Source) -> None:
    import torch

    task = published_task(name, zscl)
    classes = {"caltech101": "Caltech101", "eurosat": "EuroSAT", "sun397": "SUN397"}
    whole = sorted(pairs_of(dataset(classes[name], Path(str(zscl.root)))))
    generator = torch.Generator().manual_seed(42)
    count = int(0.8 * len(whole))
    train, test = torch.utils.data.random_split(whole, [count, len(whole) - count], generator)  # type: ignore[arg-type]
    for images, wanted in ((task.train, train), (task.test, test)):
        found = [(images.name(i), images.targets[i]) for i in range(len(images))]
        assert found == [(str(path), label) for path, label in wanted]


def test_looking_for_data_writes_nothing(tmp_path: Path) -> None:
    for name in READERS:
        with pytest.raises(ValueError, match=name):
            published_task(name, Source(tmp_path))
    assert not os.listdir(tmp_path)


def test_a_data_set_without_a_download_tells_what_to_do() -> None:
    dead = {name for name in READERS if not downloadable(entry(name))}
    assert {name for name in READERS if entry(name).manual} == dead != set()
