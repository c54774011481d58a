"""Readers of the data sets that torchvision knows, on the files that it downloads.

torchvision is imported when one is read. Only what is public in its files is taken from it, names
and labels: images are decoded here, as all others are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mulki.data.datasets import DatasetImages
from mulki.data.image_files import ImageFiles
from mulki.data.published.found import Found, image_files
from mulki.data.published.splits import four_fifths


def dataset(name: str, root: Path, **options: Any) -> Any:
    """A data set of torchvision; `download=True` downloads what is missing."""
    from torchvision import datasets

    return getattr(datasets, name)(root, **options)


def pairs_of(data: Any) -> list[tuple[str, int]]:
    """Paths and labels in a data set of torchvision."""
    if type(data).__name__ == "Caltech101":
        folder = os.path.join(data.root, "101_ObjectCategories")
        return [
            (os.path.join(folder, data.categories[label], f"image_{number:04d}.jpg"), label)
            for number, label in zip(data.index, data.y, strict=True)
        ]
    for attribute in ("samples", "_samples"):
        if hasattr(data, attribute):
            return list(getattr(data, attribute))
    paths = data._images if hasattr(data, "_images") else data._image_files
    return list(zip(map(str, paths), data._labels, strict=True))


def _listed(root: Path, data: Any) -> ImageFiles:
    return image_files(root, pairs_of(data))


def _with_splits(name: str, train: dict[str, Any], test: dict[str, Any]) -> Callable[[Path], Found]:
    def read(root: Path) -> Found:
        first, second = dataset(name, root, **train), dataset(name, root, **test)
        return Found(_listed(root, first), _listed(root, second), _classes(first))

    return read


def _arrays(name: str) -> Callable[[Path], Found]:
    def read(root: Path) -> Found:
        first, second = (dataset(name, root, train=train) for train in (True, False))
        title = name.lower()
        return Found(
            DatasetImages(first, name=f"{title}/train"),
            DatasetImages(second, name=f"{title}/test"),
            _classes(first),
        )

    return read


def _classes(data: Any) -> list[str] | None:
    # The lists of Flowers102 are numbers; newer versions of torchvision add names of their own.
    return None if type(data).__name__ == "Flowers102" else list(data.classes)


def _caltech101(root: Path) -> Found:
    # torchvision makes this folder where it is missing; nothing is written to look for data.
    if not (root / "caltech101").is_dir():
        raise FileNotFoundError(f"no folder {root / 'caltech101'}")
    return Found(*four_fifths(_listed(root, dataset("Caltech101", root))))


def _eurosat(root: Path) -> Found:
    return Found(*four_fifths(_listed(root, dataset("EuroSAT", root))))


def _sun397(root: Path) -> Found:
    # torchvision lists the files in the file system's order, on which ZSCL's split depends. Here
    # they are sorted by path, so that the split is the same on every machine.
    data = dataset("SUN397", root)
    return Found(*four_fifths(image_files(root, sorted(pairs_of(data)))), list(data.classes))


READERS: dict[str, Callable[[Path], Found]] = {
    "aircraft": _with_splits("FGVCAircraft", {"split": "train"}, {"split": "test"}),
    "caltech101": _caltech101,
    "cifar100": _arrays("CIFAR100"),
    "dtd": _with_splits("DTD", {"split": "train"}, {"split": "test"}),
    "eurosat": _eurosat,
    "flowers": _with_splits("Flowers102", {"split": "train"}, {"split": "test"}),
    "food": _with_splits("Food101", {"split": "train"}, {"split": "test"}),
    "mnist": _arrays("MNIST"),
    "oxfordpet": _with_splits("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "stanfordcars": _with_splits("StanfordCars", {"split": "train"}, {"split": "test"}),
    "sun397": _sun397,
}

# The data sets whose downloaders work: one call gets all splits.
DOWNLOADS = {
    "caltech101": "Caltech101",
    "cifar100": "CIFAR100",
    "dtd": "DTD",
    "eurosat": "EuroSAT",
    "flowers": "Flowers102",
    "food": "Food101",
    "mnist": "MNIST",
    "oxfordpet": "OxfordIIITPet",
}
