"""A task from tar shards in webdataset layout: `DIR/{train,test}/*.tar`, or `DIR/*.tar`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mulki.data.captioned_shards import (
    check_distinct,
    find_shards,
    read_classed_shards,
    readable,
    shards_of_task,
)
from mulki.data.held_out import OPTION, divided
from mulki.data.image_files import (
    choose_templates,
    class_without_images,
    holds_split,
    is_folder,
    split_folder,
    validation_folder,
    visible,
)
from mulki.data.task import Task
from mulki.errors import InputError
from mulki.files import check_regular

CLASSES = "classes.txt"


def holds_shards(folder: Path) -> bool:
    """Whether `shard_task` is to read the folder."""
    for split in ("train", "test"):
        if (split_folder(folder, split)).is_dir():
            return _has_shards(split_folder(folder, split), folder)
    return not holds_split(folder) and _has_shards(folder, folder)


def _has_shards(place: Path, folder: Path) -> bool:
    # Beside class folders, tar files without names of classes are something else.
    named = (folder / CLASSES).is_file()
    return bool(find_shards(place)) and (named or not any(map(is_folder, visible(place))))


def shard_task(
    path: str | os.PathLike[str],
    *,
    templates: Sequence[str] | None = None,
    skip_bad_images: bool = False,
    test_fraction: float | None = None,
    test_only: bool = False,
) -> Task:
    """Read a task from the shards in `path/train/` and `path/test/`, or in `path` itself.

    Where there are shards in `path/val/` beside these two, they hold validation images.
    Each image stands beside its class index, ``000000.jpg`` and ``000000.cls``; `path/classes.txt`
    has the class names, one a line, the first one that of index 0. The task is named after the
    folder. Images are checked, see `mulki.data.image_files.find_unreadable`. Of shards in `path` a
    part of each class is held out to test on, by the names of shards and images, if `test_fraction`
    says how much: see `mulki.data.held_out.held_out`.

    Args:
        path: the folder.
        templates: prompts; by default as of `mulki.data.folder_task`.
        skip_bad_images: leave unreadable images out and list them in `Task.skipped`.
        test_fraction: the share of the images to test on, in (0, 1), where there is no split yet.
        test_only: see `Task`; `path/train/` may be missing.

    Raises:
        InputError: no shards for a split, no class names, a damaged shard, one that is in two
            splits, an image without a class or with one that has no name, a class without training
            images or with one image where a part is held out, or what `Task` refuses.
        BadImage: an unreadable image, unless skipped.
    """
    root = Path(path)
    templates = choose_templates(templates, root, f"templates for {root}")
    classes = _class_names(root / CLASSES)
    missing = (
        "no tar shards in {}/; add those of its images, or put the shards of all images into the "
        f"folder of the task and pass {OPTION}"
    )
    found, test_fraction = shards_of_task(root, missing, test_fraction, test_only=test_only)
    validation = [] if test_only else _validation_shards(root, found)
    read = [
        read_classed_shards(shards, len(classes), skip_bad_images=skip_bad_images)
        for shards in (*found, validation)
        if shards
    ]
    skipped = tuple(name for _, names in read for name in names)
    # Before unreadable images are left out, which would change the division.
    splits = [images for images, _ in read]
    of_val = [splits.pop()] if validation else []
    whole = divided(splits, test_fraction, where=str(root), classes=classes)
    train, test, *val = (readable(images, (), {*skipped})[0] for images in (*whole, *of_val))
    if not test_only and (emptied := class_without_images(train, classes)) is not None:
        raise InputError(
            f"{root}: no readable train image of class {emptied}; add some, or take the name out "
            f"of {CLASSES} and give the classes behind it other indices"
        )
    name = Path(os.path.abspath(root)).name
    return Task(
        name,
        classes,
        templates,
        train,
        test,
        skipped,
        test_fraction,
        test_only,
        val[0] if val and len(val[0]) else None,
    )


def _validation_shards(root: Path, found: Sequence[Sequence[Path]]) -> list[Path]:
    folder = validation_folder(root)
    if folder is None:
        return []
    shards = find_shards(folder)
    if not shards:
        raise InputError(
            f"{folder}: no tar shards of validation images in it; add them, or remove the folder"
        )
    for others in found:
        check_distinct(shards, others)
    return shards


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
