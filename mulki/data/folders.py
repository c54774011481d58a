"""A task from folders: `DIR/train/<class>/*` and `DIR/test/<class>/*`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mulki.data.decoding import SUFFIXES, BadImage, decode, verify
from mulki.data.prompts import DEFAULT_TEMPLATES, check_templates, read_templates
from mulki.data.task import Task, split_fingerprint
from mulki.errors import InputError


@dataclass(frozen=True)
class FolderImages:
    """Image files below one folder; an `ImageSet`.

    Attributes:
        root: the folder of the split.
        files: paths relative to it, with `/` whatever the system, [n].
        sizes: bytes, [n].
        targets: class indices, [n].
    """

    root: Path
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Image.Image:
        return decode(self.root / self.files[index], self.name(index))

    def name(self, index: int) -> str:
        return str(self.root / self.files[index])

    def fingerprint(self) -> str:
        return split_fingerprint(zip(self.files, self.sizes, self.targets, strict=True))


def folder_task(
    path: str | os.PathLike[str],
    *,
    templates: Sequence[str] | None = None,
    skip_bad_images: bool = False,
) -> Task:
    """Read a task from `path/train/<class>/*` and `path/test/<class>/*`.

    The task is named after the folder, classes after theirs with underscores read as spaces, both
    sorted by folder name. Hidden entries and files without an image suffix are passed over.

    Every image is checked here, before training starts, as far as that is cheap: PNG by its
    checksums, JPEG by its header and end, other formats by decoding. Damage inside a JPEG shows
    only when it is loaded.

    Args:
        path: the folder.
        templates: prompts; by default those of `path/prompts.txt` (one a line, # comments), and
            without that file "a photo of a {}.".
        skip_bad_images: leave unreadable images out and list them in `Task.skipped`.

    Raises:
        InputError: a missing folder, fewer than two classes, an empty class, classes that differ
            between train and test, or a template without exactly one `{}`.
        BadImage: an unreadable image, unless skipped.
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"{root}: no such folder; give a folder that holds train/ and test/")
    if not root.is_dir():
        raise InputError(f"{root}: a file; wanted a folder that holds train/ and test/")
    if templates is not None:
        templates = check_templates(templates, f"templates for {root}")
    elif (root / "prompts.txt").exists():
        templates = read_templates(root / "prompts.txt")
    else:
        templates = DEFAULT_TEMPLATES

    classes = _class_folders(root, "train")
    _check_same_classes(root, classes, _class_folders(root, "test"))
    if len(classes) < 2:
        raise InputError(
            f"{root / 'train'}: only one class, {classes[0]}; at least two class folders are needed"
        )
    listed = {split: _list_images(root / split, classes) for split in ("train", "test")}
    bad = _find_unreadable([root / split / f for split in listed for f, _, _ in listed[split]])
    if bad and not skip_bad_images:
        more = f"; {len(bad) - 1} more like it" if len(bad) > 1 else ""
        raise BadImage(f"{next(iter(bad.values()))}, or pass --skip-bad-images{more}")
    train, test = (_keep_readable(root / split, classes, listed[split], bad) for split in listed)
    return Task(
        name=Path(os.path.abspath(root)).name,  # "." and "birds/.." have names too
        classes=tuple(c.replace("_", " ").strip() for c in classes),
        templates=tuple(templates),
        train=train,
        test=test,
        skipped=tuple(str(p) for p in bad),
    )


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if not e.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from error
    return sorted(found, key=lambda e: e.name)


def _class_folders(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.exists():
        found = ", ".join(e.name + "/" for e in _visible(root) if e.is_dir()) or "no folders"
        raise InputError(
            f"{root}: no {split}/ (found: {found}); lay the images out as {split}/<class>/*"
        )
    if not folder.is_dir():
        raise InputError(f"{folder}: a file; wanted a folder with a folder for each class")
    classes = [e.name for e in _visible(folder) if e.is_dir()]
    if not classes:
        raise InputError(f"{folder}: no class folders; lay the images out as {split}/<class>/*")
    return classes


def _check_same_classes(root: Path, train: Sequence[str], test: Sequence[str]) -> None:
    lonely = [
        f"only in {split}/: {', '.join(sorted(names))}"
        for split, names in (("train", set(train) - set(test)), ("test", set(test) - set(train)))
        if names
    ]
    if lonely:
        raise InputError(
            f"{root}: train/ and test/ must hold the same classes ({'; '.join(lonely)}); "
            "rename, add or remove these folders"
        )


def _list_images(folder: Path, classes: Sequence[str]) -> list[tuple[str, int, int]]:
    """Relative name, bytes and target of each image of a split."""
    images: list[tuple[str, int, int]] = []
    for target, name in enumerate(classes):
        entries = _visible(folder / name)
        for entry in entries:
            # Taking images from below would merge classes if a level too many was given.
            if entry.is_dir():
                raise InputError(
                    f"{folder / name / entry.name}: a folder inside a class; "
                    f"images lie directly in {folder.name}/<class>/, so move them up"
                )
        # A dangling link is no file to the system, and to the user an image that cannot be read.
        chosen = [e for e in entries if os.path.splitext(e.name)[1].lower() in SUFFIXES]
        if not chosen:
            other = f" among {len(entries)} files" if entries else ""
            raise InputError(
                f"{folder / name}: class {name} has no image{other}; add images "
                f"({' '.join(sorted(SUFFIXES))}) or remove the class from train/ and test/"
            )
        images += [(f"{name}/{e.name}", _size(e), target) for e in chosen]
    return images


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0  # reported by the check of the image itself


def _find_unreadable(paths: Sequence[Path]) -> dict[Path, BadImage]:
    def check(path: Path) -> BadImage | None:
        try:
            verify(path)
        except BadImage as error:
            return error
        return None

    # PIL loads most of its plug-ins when a file first needs one; a second thread that looks for one
    # at that moment can miss it and take its file for no image at all.
    Image.init()
    # Threads help: the work is reading files and decoding, both outside the interpreter lock.
    with ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) + 4)) as pool:
        found = zip(paths, pool.map(check, paths), strict=True)
        return {path: error for path, error in found if error is not None}


def _keep_readable(
    folder: Path,
    classes: Sequence[str],
    images: Sequence[tuple[str, int, int]],
    bad: dict[Path, BadImage],
) -> FolderImages:
    kept = [image for image in images if folder / image[0] not in bad]
    emptied = set(range(len(classes))) - {target for _, _, target in kept}
    if emptied:
        name = classes[min(emptied)]
        raise InputError(
            f"{folder / name}: every image of class {name} is unreadable; "
            "add readable ones or remove the class from train/ and test/"
        )
    files, sizes, targets = zip(*kept, strict=True)
    return FolderImages(folder, files, sizes, targets)
