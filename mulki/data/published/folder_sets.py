"""Readers of the data sets of class-incremental work that are folders of images.

Their folders are those that the official archives unpack to: `tiny-imagenet-200/`, `imagenet-r/`,
`CUB_200_2011/`, and for ImageNet `imagenet/train/<wnid>/` and `imagenet/val/<wnid>/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mulki.data.decoding import SUFFIXES
from mulki.data.published.found import Found, image_files
from mulki.data.published.splits import four_fifths
from mulki.files import check_regular

# Two names of CLIP's list occur twice in it; their other names in WordNet tell them apart.
_RENAMED = {"n04008634": "projectile", "n04355933": "sunglass"}


def imagenet_names() -> dict[str, str]:
    """The class names of ImageNet-1k by WordNet id, in the order of their index."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo("imagenet-1k").label_names()
    return dict(zip(wnids, IMAGENET_CLASSNAMES, strict=True)) | _RENAMED


def _images_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _class_folders(folder: Path, wnids: Sequence[str]) -> list[tuple[Path, int]]:
    return [(path, number) for number, w in enumerate(wnids) for path in _images_under(folder / w)]


def _imagenet(count: int) -> Callable[[Path], Found]:
    def read(root: Path) -> Found:
        names = dict(list(imagenet_names().items())[:count])
        train, test = (
            image_files(root, _class_folders(root / "imagenet" / split, list(names)))
            for split in ("train", "val")
        )
        return Found(train, test, list(names.values()))

    return read


def _imagenet_r(root: Path) -> Found:
    folder = root / "imagenet-r"
    names = imagenet_names()
    wnids = sorted(path.name for path in folder.iterdir() if path.name in names)
    whole = image_files(root, _class_folders(folder, wnids))
    return Found(*four_fifths(whole), [names[wnid] for wnid in wnids])


def _tinyimagenet(root: Path) -> Found:
    folder = root / "tiny-imagenet-200"
    wnids = _text(folder / "wnids.txt").split()
    train = [
        (path, number)
        for number, wnid in enumerate(wnids)
        for path in _images_under(folder / "train" / wnid / "images")
    ]
    index = {wnid: number for number, wnid in enumerate(wnids)}
    lines = _text(folder / "val" / "val_annotations.txt").splitlines()
    rows = [line.split("\t") for line in lines]
    test = [(folder / "val" / "images" / row[0], index[row[1]]) for row in rows]
    return Found(image_files(root, train), image_files(root, test))


def _cub(root: Path) -> Found:
    folder = root / "CUB_200_2011"

    def column(file: str) -> list[str]:
        # Each line is a number and what has it, in the order of the numbers.
        lines = _text(folder / file).splitlines()
        return [line.split(" ", 1)[1].strip() for line in lines]

    targets = [int(label) - 1 for label in column("image_class_labels.txt")]
    rows = list(zip(column("images.txt"), targets, column("train_test_split.txt"), strict=True))
    train, test = (
        image_files(
            root, [(folder / "images" / path, label) for path, label, at in rows if at == w]
        )
        for w in ("1", "0")
    )
    # "001.Black_footed_Albatross"
    names = [name.split(".", 1)[1].replace("_", " ") for name in column("classes.txt")]
    return Found(train, test, names)


READERS: dict[str, Callable[[Path], Found]] = {
    "tinyimagenet": _tinyimagenet,
    "imagenet100": _imagenet(100),
    "imagenet1k": _imagenet(1000),
    "imagenet-r": _imagenet_r,
    "cub": _cub,
}


def _text(path: Path) -> str:
    check_regular(path)
    return path.read_text(encoding="utf-8")
