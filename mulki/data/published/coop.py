"""Splits in files of CoOp, which the user has beside the images: `split_zhou_*.json`.

Each holds the keys train, val and test, with a list of [path, label, class name]. The images of val
are not used. FGVC-Aircraft has lists of its own, and CIFAR-100 and MNIST have no such file: these
three are read as ZSCL reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mulki.data.published.entries import Entry
from mulki.data.published.found import Found, image_files
from mulki.errors import InputError
from mulki.files import check_regular, from_json


class NoImages(InputError):
    """There is a split, and no folder of its images."""


def read_split(entry: Entry, root: Path) -> Found:
    """Read a data set with the split that its user has as a file.

    Raises:
        NoImages: no folder of its images.
        InputError: no such file, one with another content, or one that names a missing image.
    """
    protocol = entry.protocols["coop"]
    assert protocol.split is not None
    folders = [root / Path(images).parts[0] for images in protocol.images]
    tried = [folder / protocol.split for folder in folders] + [root / protocol.split]
    path = next((each for each in tried if each.is_file()), None)
    if path is None:
        raise InputError(
            f"{entry.name}: no file {tried[0]}; --protocol coop reads the split from it: get it "
            "from DATASETS.md of https://github.com/KaiyangZhou/CoOp, or pass --protocol zscl"
        )
    images = next((f for name in protocol.images if (f := root / name).is_dir()), None)
    if images is None:
        raise NoImages(
            f"{entry.name}: no folder {root / protocol.images[0]} with its images; get them as "
            "DATASETS.md of https://github.com/KaiyangZhou/CoOp says, or with mulki tasks "
            f"mtil:{entry.name} --prepare --data-root {root}"
        )
    rows = _rows(path)
    classes: dict[int, str] = {}
    for _, label, name in (*rows["train"], *rows["test"]):
        if classes.setdefault(label, name) != name:
            raise InputError(
                f'{path}: class {label} is called "{classes[label]}" and "{name}"; restore the file'
            )
    if sorted(classes) != list(range(len(classes))):
        raise InputError(
            f"{path}: {len(classes)} classes are not numbered from 0 on; restore the file"
        )
    train, test = (
        image_files(root, [(images / name, label) for name, label, _ in rows[split]])
        for split in ("train", "test")
    )
    return Found(train, test, [classes[label] for label in range(len(classes))])


def _rows(path: Path) -> dict[str, list[tuple[str, int, str]]]:
    check_regular(path)
    try:
        content: Any = from_json(path.read_text(encoding="utf-8"))
        return {
            split: [(str(name), int(label), str(of)) for name, label, of in content[split]]
            for split in ("train", "test")
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: no split of CoOp ({type(error).__name__}: {reason}); wanted train, val and "
            "test with rows of path, label and class name: restore the file"
        ) from None
