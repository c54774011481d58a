"""A task from tar shards in webdataset layout: `DIR/train/*.tar`, `DIR/test/*.tar`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mulki.data.captioned_shards import find_shards, read_classed_shards, shards_of_splits
from mulki.data.image_files import choose_templates, class_without_images, split_folder
from mulki.data.task import Task
from mulki.errors import InputError
from mulki.files import check_regular

CLASSES = "classes.txt"


def holds_shards(folder: Path) -> bool:
    """Whether `shard_task` is to read the folder."""
    train = split_folder(folder, "train")
    return train.is_dir() and bool(find_shards(train))


def shard_task(
    path: str | os.PathLike[str],
    *,
    templates: Sequence[str] | None = None,
    skip_bad_images: bool = False,
) -> Task:
    """Read a task from the shards in `path/train/` and `path/test/`.

    Each image stands beside its class index, ``000000.jpg`` and ``000000.cls``; `path/classes.txt`
    has the class names, one a line, the first one that of index 0. The task is named after the
    folder. Images are checked, see `mulki.data.image_files.find_unreadable`.

    Args:
        path: the folder.
        templates: prompts; by default as of `mulki.data.folder_task`.
        skip_bad_images: leave unreadable images out and list them in `Task.skipped`.

    Raises:
        InputError: no shards for a split, no class names, a damaged shard, an image without a class
            or with one that has no name, a class without training images, or what `Task` refuses.
        BadImage: an unreadable image, unless skipped.
    """
    root = Path(path)
    templates = choose_templates(templates, root, f"templates for {root}")
    classes = _class_names(root / CLASSES)
    (train, skipped), (test, also) = (
        read_classed_shards(shards, len(classes), skip_bad_images=skip_bad_images)
        for shards in shards_of_splits(root, "no tar shards in {}/; add those of its images")
    )
    if (emptied := class_without_images(train, classes)) is not None:
        raise InputError(
            f"{root}: no readable image of class {emptied} in train/; add some, or take the name "
            f"out of {CLASSES} and give the classes behind it other indices"
        )
    name = Path(os.path.abspath(root)).name
    return Task(name, classes, templates, train, test, (*skipped, *also))


def _class_names(path: Path) -> tuple[str, ...]:
    check_regular(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; name the classes of the shards in it, one a line in the order "
            "of their index"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None
    return tuple(line.strip() for line in lines if line.strip())
