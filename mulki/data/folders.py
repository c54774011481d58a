"""A task from folders: `DIR/train/<class>/*` and `DIR/test/<class>/*`, or `DIR/<class>/*`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mulki.data.decoding import SUFFIXES
from mulki.data.held_out import OPTION, divided
from mulki.data.image_files import (
    ImageFiles,
    choose_templates,
    class_without_images,
    classes_of_one_split,
    find_unreadable,
    holds_split,
    is_folder,
    size_of,
    split_folder,
    validation_folder,
    visible,
)
from mulki.data.task import Task
from mulki.errors import InputError


def folder_task(
    path: str | os.PathLike[str],
    *,
    templates: Sequence[str] | None = None,
    skip_bad_images: bool = False,
    test_fraction: float | None = None,
    test_only: bool = False,
) -> Task:
    """Read a task from `path/train/<class>/*` and `path/test/<class>/*`, or `path/<class>/*`.

    Where `path/val/<class>/*` is there beside these two, it holds validation images, of some or all
    classes. Other names of these folders are those of `mulki.data.image_files.split_folder`.
    Without any of them the class folders lie in `path` itself, and a part of each class is held out
    to test on, if `test_fraction` says how much: see `mulki.data.held_out.held_out`.

    The task is named after the folder, classes after theirs with underscores read as spaces, both
    sorted by folder name. Hidden entries and files without an image suffix are passed over.

    Every image is checked here, before training starts, as far as that is cheap: see
    `mulki.data.image_files.find_unreadable`.

    Args:
        path: the folder.
        templates: prompts; by default those of `path/prompts.txt` (one a line, # comments), and
            without that file "a photo of a {}.".
        skip_bad_images: leave unreadable images out and list them in `Task.skipped`.
        test_fraction: the share of the images to test on, in (0, 1), where there is no split yet.
        test_only: see `Task`; `path/train` may be missing, or have classes that are not tested.

    Raises:
        InputError: a missing folder, fewer than two classes, an empty class, classes that differ
            between train and test, a class with one image where a part is held out, or a template
            without exactly one `{}`.
        BadImage: an unreadable image, unless skipped.
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"{root}: no such folder; give a folder that holds train/ and test/")
    if not root.is_dir():
        raise InputError(
            f"{root}: a file; wanted a folder that holds train/ and test/, or a .csv file"
        )
    templates = choose_templates(templates, root, f"templates for {root}")
    if test_fraction is not None and holds_split(root):
        test_fraction = None
    folders = [root]
    if test_fraction is None:
        alone = test_only and not split_folder(root, "train").exists()
        names = ("test",) if alone else ("train", "test")
        folders = [_split_of(root, split) for split in names]
    classes, tested = _classes_in(folders[0]), _classes_in(folders[-1])
    shared = [name for name in classes if name in tested] if test_only else classes
    if differing := classes_of_one_split(shared, tested):
        raise InputError(
            f"{root}: train/ and test/ must hold the same classes ({differing}); "
            "rename, add or remove these folders"
        )
    if len(classes) < 2 and not test_only:
        raise InputError(
            f"{folders[0]}: only one class, {classes[0]}; at least two class folders are needed"
        )
    validation = None if test_only else validation_folder(root)
    if validation is not None:
        unknown = [name for name in _classes_in(validation) if name not in classes]
        if unknown:
            raise InputError(
                f"{validation / unknown[0]}: a class without training images; rename, add or "
                "remove it"
            )
    splits = [_list_images(folder, classes) for folder in folders]
    # Before unreadable images are left out, which would change the division.
    whole = divided(splits, test_fraction, where=str(root), classes=classes)
    of_val = [] if validation is None else [_list_images(validation, classes)]
    bad = find_unreadable([*whole, *of_val], skip_bad_images=skip_bad_images)
    train, test, *val = (images.without(bad) for images in (*whole, *of_val))
    for split, images in (("train", train), ("test", test)):
        if not test_only and (emptied := class_without_images(images, classes)) is not None:
            raise InputError(
                f"{images.root / emptied}: every {split} image of class {emptied} is unreadable; "
                "add readable ones or remove the class"
            )
    return Task(
        name=Path(os.path.abspath(root)).name,  # "." and "birds/.." have names too
        classes=tuple(c.replace("_", " ").strip() for c in classes),
        templates=templates,
        train=train,
        test=test,
        skipped=tuple(bad),
        test_fraction=test_fraction,
        test_only=test_only,
        val=val[0] if val and len(val[0]) else None,
    )


def _split_of(root: Path, split: str) -> Path:
    folder = split_folder(root, split)
    if not folder.exists():
        found = ", ".join(e.name + "/" for e in visible(root) if is_folder(e))
        more = " and test/<class>/*" if split == "train" else ""
        if found and not holds_split(root):
            more += f", or pass {OPTION} if these are classes"
        elif split == "test":
            more = f", or move what is in train/ up to {root} and pass {OPTION}"
        raise InputError(
            f"{root}: no {split}/ (found: {found or 'no folders'}); lay the images out as "
            f"{split}/<class>/*{more}"
        )
    if not folder.is_dir():
        raise InputError(f"{folder}: a file; wanted a folder with a folder for each class")
    return folder


def _classes_in(folder: Path) -> list[str]:
    classes = [e.name for e in visible(folder) if is_folder(e)]
    if not classes:
        raise InputError(
            f"{folder}: no class folders; lay the images out as {folder.name}/<class>/*"
        )
    return classes


def _list_images(folder: Path, classes: Sequence[str]) -> ImageFiles:
    images: list[tuple[str, int, int]] = []
    for target, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue  # a class of which no image is tested
        entries = visible(folder / name)
        for entry in entries:
            # Images in subfolders are refused: classes would be merged if the user gave a folder
            # one level too high.
            if is_folder(entry):
                raise InputError(
                    f"{folder / name / entry.name}: a folder inside a class; "
                    f"images lie directly in {folder.name}/<class>/, so move them up"
                )
        # Not `is_file`: a link to a missing file counts as an image that cannot be read.
        chosen = [e for e in entries if os.path.splitext(e.name)[1].lower() in SUFFIXES]
        if not chosen:
            other = f" among {len(entries)} files" if entries else ""
            raise InputError(
                f"{folder / name}: class {name} has no image{other}; add images "
                f"({' '.join(sorted(SUFFIXES))}) or remove the class"
            )
        images += [(f"{name}/{e.name}", size_of(e), target) for e in chosen]
    files, sizes, targets = zip(*images, strict=True)
    return ImageFiles(folder, files, sizes, targets)
