"""What a reader finds on disk, and image files listed by others as an `ImageSet`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mulki.data.image_files import ImageFiles
from mulki.data.task import ImageSet
from mulki.errors import InputError


@dataclass(frozen=True)
class Found:
    """A data set as its files have it.

    Attributes:
        train, test: the splits.
        classes: the names by index that the files have, [C]; None where they have none.
    """

    train: ImageSet
    test: ImageSet
    classes: Sequence[str] | None = None


def image_files(root: Path, pairs: Iterable[tuple[str | os.PathLike[str], int]]) -> ImageFiles:
    """Image files from their paths and class indices.

    Args:
        root: what the names are relative to.
        pairs: absolute paths, or paths relative to `root`, and targets.

    Raises:
        InputError: a file does not exist.
    """
    names, sizes, targets = [], [], []
    for path, target in pairs:
        full = root / path
        try:
            sizes.append(full.stat().st_size)
        except OSError as error:
            raise InputError(
                f"{full}: cannot be read ({error.strerror}), but the lists of the data set name it"
            ) from None
        names.append(full.relative_to(root).as_posix())
        targets.append(int(target))
    return ImageFiles(root, tuple(names), tuple(sizes), tuple(targets))
