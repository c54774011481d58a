"""Images without labels: from files, folders, tar shards, lists of paths, or as pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mulki.data.captioned_shards import Joined, Loadable, find_shards, open_shards
from mulki.data.decoding import bad_image, to_rgb
from mulki.data.image_files import ImageFiles
from mulki.data.reference import images_below
from mulki.errors import InputError

#: In place of a path: one path in each line of standard input.
STDIN = "-"


@dataclass(frozen=True)
class Pictures:
    """Images that are in memory, named by their number from `first` on."""

    images: Sequence[Image.Image]
    first: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        with bad_image(self.name(index), "convert it, or leave it out"):
            return to_rgb(self.images[index])

    def name(self, index: int) -> str:
        return f"image {self.first + index}"


def find_images(
    paths: Sequence[str | os.PathLike[str]], stdin: Iterable[str] = ()
) -> Joined[Loadable]:
    """The images that paths name, in their order; those of a folder sorted by name.

    Whether they can be read shows when they are loaded.

    Args:
        paths: image files; tar shards; folders of images, with their folders; folders of shards; or
            "-" for the paths in `stdin`.
        stdin: lines.

    Raises:
        InputError: a path that does not exist, a damaged shard, a folder of images and shards, or
            no image at all.
    """
    parts: list[Loadable] = []
    names = [os.fspath(path) for path in paths]
    for path in names:
        if path == STDIN:
            parts.append(_files(Path(), [line.rstrip("\r\n") for line in stdin if line.strip()]))
        elif shards := find_shards(Path(path)):
            if os.path.isdir(path) and images_below(Path(path)):
                raise InputError(
                    f"{path}: has shards ({shards[0].name}) and images; pass the shards by their "
                    "names, and the images from a folder of their own"
                )
            parts.append(open_shards(shards))
        elif not os.path.exists(path):
            raise InputError(f"{path}: no such file or folder; pass images, folders or tar shards")
        elif os.path.isdir(path):
            parts.append(_files(Path(path), sorted(images_below(Path(path)))))
        else:
            parts.append(_files(Path(), [path]))
    found = Joined(tuple(parts))
    if not len(found):
        raise InputError(f"{', '.join(names)}: no images; pass some")
    return found


def _files(root: Path, names: Sequence[str]) -> ImageFiles:
    nothing = (0,) * len(names)
    return ImageFiles(root, tuple(names), nothing, nothing)
