"""Reference sets: images with captions beside the tasks, on which some methods distil."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from mulki.data.decoding import SUFFIXES
from mulki.data.image_files import ImageFiles
from mulki.data.task import ImageSet, Task
from mulki.errors import InputError
from mulki.files import read_csv

CAPTIONS = "captions.csv"


@dataclass(frozen=True)
class ReferenceSet:
    """Images, each with a caption.

    Args:
        images: n images; their targets are not used.
        captions: [n].

    Raises:
        InputError: no image, or another number of captions than of images.
    """

    images: ImageSet
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.captions):
            raise InputError(
                f"--reference: got {len(self.images)} images and {len(self.captions)} captions; "
                f"give each image one caption"
            )
        if not self.captions:
            raise InputError("--reference: the set is empty; add images with captions")

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        """Hex SHA-256 of images and captions, the same wherever the files lie."""
        content = json.dumps([self.images.fingerprint(), *self.captions])
        return hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def of_task(cls, task: Task) -> ReferenceSet:
        """The training images of a task, each with its class's first prompt as the caption."""
        prompts = [of_class[0] for of_class in task.prompts()]
        return cls(task.train, tuple(prompts[target] for target in task.train.targets))


def read_reference(path: str | os.PathLike[str]) -> ReferenceSet:
    """Read a reference set.

    Args:
        path: a CSV file with the columns ``path`` and ``caption``, whose paths are relative to the
            folder of the file; or a folder with such a file, ``captions.csv``, that has a line for
            every image in the folder.

    Raises:
        InputError: no such file or folder, a CSV that cannot be read, an image without a caption, a
            caption without an image, or an empty set.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"--reference: no file or folder {path}; pass a CSV with the columns path and caption, "
            f"a folder of images with {CAPTIONS}, or current"
        )
    file = path / CAPTIONS if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise InputError(
            f"--reference: {path} has {len(_images_below(path))} images and no captions; add "
            f"{CAPTIONS} with the columns path and caption"
        )
    captions = _read_captions(file)
    missing = sorted(_images_below(path) - captions.keys()) if path.is_dir() else []
    if missing:
        more = f" and {len(missing) - 1} more images" if len(missing) > 1 else ""
        raise InputError(
            f"--reference: {file} has no caption for {missing[0]}{more}; add a line for each, or "
            f"remove the images"
        )
    files = tuple(captions)
    sizes = tuple((file.parent / name).stat().st_size for name in files)
    images = ImageFiles(file.parent, files, sizes, targets=(0,) * len(files))
    return ReferenceSet(images, tuple(captions.values()))


def _images_below(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("[!.]*") if path.suffix.lower() in SUFFIXES)
    return {path.relative_to(folder).as_posix() for path in found}


def _read_captions(file: Path) -> dict[str, str]:
    # Captions by path.
    try:
        (_, header), *lines = read_csv(file, "a CSV with the columns path and caption")
    except InputError as error:
        raise InputError(f"--reference: {error}") from None
    if not {"path", "caption"} <= set(header):
        raise InputError(
            f"--reference: {file} has the columns {', '.join(header)}; wanted path and caption in "
            f"its first line"
        )
    captions: dict[str, str] = {}
    for number, cells in lines:
        row = dict(zip(header, cells, strict=False))
        _add_caption(captions, row, f"{file}, line {number}", file.parent)
    return captions


def _add_caption(captions: dict[str, str], row: dict[str, str], where: str, folder: Path) -> None:
    name, caption = Path(row.get("path", "")).as_posix(), row.get("caption", "")
    if not (folder / name).is_file():
        raise InputError(
            f"--reference: {where}: no image {name!r} for its caption; correct the path (relative "
            f"to {folder}), or remove the line"
        )
    if not caption:
        raise InputError(
            f"--reference: {where}: no caption for {name}; write one, or remove the line"
        )
    if name in captions:
        raise InputError(f"--reference: {where}: {name} has a caption already; remove one of them")
    captions[name] = caption
