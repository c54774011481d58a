"""Manifests: which images a published data set had when it was prepared.

A manifest is a text file with a line an image: split, class name, size in bytes, path relative to
the data root, with tabs between. Two places are looked at: `manifests/` beside this file, for what
holds on every machine, and `manifests/` in the data root, where `mulki tasks ... --prepare` writes
one. A data set that differs from a manifest is refused, so that results of a data root whose files
were changed in between are never compared unnoticed.
"""

from __future__ import annotations

from pathlib import Path

from mulki.data.image_files import ImageFiles
from mulki.data.subset import Subset
from mulki.data.task import ImageSet, Task
from mulki.errors import InputError
from mulki.files import check_regular, write_atomic

FOLDER = "manifests"
COMMITTED = Path(__file__).parent / FOLDER


def write(task: Task, protocol: str, root: Path) -> Path | None:
    """Write the manifest of a task into its data root, where there is none yet.

    Args:
        task: a published data set.
        protocol: that it was read with.
        root: the data root.

    Returns:
        The file; None for a data set whose images are no files: the checksums of its archives
        say what they are.

    Raises:
        InputError: the file cannot be written, or a file name does not go into a line.
    """
    lines = _lines(task)
    if not lines:
        return None
    odd = next((line for line in lines if line.count("\t") != 3 or "\n" in line), None)
    if odd is not None:
        raise InputError(f"{odd!r}: a tab or a line break in a name; rename the file")
    path = root / FOLDER / _name(task, protocol)
    if not path.exists():
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, "".join(f"{line}\n" for line in lines))
        except (OSError, UnicodeEncodeError) as error:
            raise InputError(
                f"{path}: cannot be written ({error}); make the data root writable"
            ) from None
    return path


def difference(task: Task, protocol: str, root: Path) -> str:
    """In words, how a task differs from its manifests and what to do; empty if it does not.

    Raises:
        InputError: a manifest that cannot be read.
    """
    for path in (COMMITTED / _name(task, protocol), root / FOLDER / _name(task, protocol)):
        if not path.exists():
            continue
        wanted, there = set(_read(path)), set(_lines(task))
        if wanted == there:
            continue
        gone, new = sorted(wanted - there), sorted(there - wanted)
        split, name, size, file = (gone or new)[0].split("\t")
        first = f"{file} of class {name}, {size} bytes, in the {split} split"
        return (
            f"its images differ from {path}: {len(gone)} of it are not there like that, {len(new)} "
            f"others are; the first: {first}; restore the files, or remove the manifest and "
            "prepare the data set again to take them as they are"
        )
    return ""


def _name(task: Task, protocol: str) -> str:
    return f"{task.name}.{protocol}.tsv"


def _lines(task: Task) -> list[str]:
    lines = []
    for split, images in (("train", task.train), ("test", task.test)):
        if files := _files(images):
            lines += [
                "\t".join((split, task.classes[target], str(size), file))
                for target, (file, size) in zip(images.targets, files, strict=True)
            ]
    return lines


def _files(images: ImageSet) -> list[tuple[str, int]]:
    # Path below the data root and size of each image; empty where they are no files.
    if isinstance(images, ImageFiles):
        return list(zip(images.files, images.sizes, strict=True))
    if not hasattr(images, "image_set"):
        return []
    whole = _files(images.image_set)
    return [whole[i] for i in images.indices] if whole and isinstance(images, Subset) else whole


def _read(path: Path) -> list[str]:
    check_regular(path)
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore or remove it") from None
    if any(line.count("\t") != 3 for line in lines):
        raise InputError(
            f"{path}: no manifest; wanted lines of split, class, size and path with tabs between: "
            "restore or remove it"
        )
    return lines
