"""A task from a folder that `save_to_disk` of Hugging Face's package `datasets` has written.

A `DatasetDict` has a folder for each split beside `dataset_dict.json`. In the folder of a split
lie `state.json`, which names the Arrow files, and `dataset_info.json`, which has the types of the
columns. `datasets` is imported when such a task is read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulki.data.decoding import BadImage
from mulki.data.held_out import OPTION, divided
from mulki.data.image_files import (
    EncodedImages,
    choose_templates,
    class_without_images,
    classes_of_one_split,
    find_unreadable,
    size_of,
    split_folder,
    split_name,
)
from mulki.data.task import Task
from mulki.errors import InputError
from mulki.files import check_regular, from_json

_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_IMAGES, _LABELS = ("image", "img"), ("label", "fine_label")
_MARKED = 64  # bytes
# Ends an Arrow stream. Without it, one that is cut between two batches would pass for a whole one.
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class ArrowImages(EncodedImages):
    """Images in rows of a Hugging Face data set; an `ImageSet`. They stay on disk until loaded.

    Attributes:
        folder: of the split.
        rows: the data set, whose items are ``{column: {"bytes": ..., "path": ...}}``. It pickles
            as the names of its files.
        column: that of the images.
        places: row of each image, [n].
        sizes: bytes of each encoded image, [n].
        marks: checksums of its last bytes, which tell images of one size apart, [n].
        targets: class indices, [n].
    """

    folder: Path
    rows: Any
    column: str
    places: tuple[int, ...]
    sizes: tuple[int, ...]
    marks: tuple[int, ...]
    targets: tuple[int, ...]

    def name(self, index: int) -> str:
        return f"{self.folder}[{self.places[index]}]"

    def identities(self) -> Iterator[str]:
        # The number of a row stays where rows change places.
        return (f"{row} {mark:08x}" for row, mark in zip(self.places, self.marks, strict=True))

    @property
    def files(self) -> tuple[str, ...]:
        """Numbers of rows, by which the images are divided, [n]."""
        return tuple(map(str, self.places))

    def _source(self, index: int) -> Path | bytes:
        try:
            cell = self.rows[self.places[index]][self.column] or {}
            content, path = cell.get("bytes"), cell.get("path")
        except MemoryError:
            raise
        except Exception as error:  # pyarrow's, of a file that has changed since it was checked
            raise BadImage.at(self.name(index), error) from error
        if content is not None:
            return bytes(content)
        if path:
            return Path(path)
        raise BadImage.at(self.name(index), "the row has neither bytes nor a path")


def holds_dataset(folder: Path) -> bool:
    """Whether `huggingface_task` is to read the folder."""
    if any((folder / name).is_file() for name in (_DICT, _STATE)):
        return True
    return (folder / _INFO).is_file() and not split_folder(folder, "train").is_dir()


def huggingface_task(
    path: str | os.PathLike[str],
    *,
    image: str | None = None,
    label: str | None = None,
    templates: Sequence[str] | None = None,
    skip_bad_images: bool = False,
    test_fraction: float | None = None,
    test_only: bool = False,
) -> Task:
    """Read a task from a folder that `datasets.DatasetDict.save_to_disk` has written.

    Its splits are `train` and `test`, and `validation` for the images by which the best step is
    chosen; other names of them are those of `mulki.data.image_files.split_folder`. Where there is
    `train` alone, or a `Dataset` without splits, a part of each class is held out to test on by the
    numbers of the rows, if `test_fraction` says how much: see `mulki.data.held_out.held_out`. The
    class names are those of the column of labels, with underscores read as spaces. The task is
    named after the folder.

    The Arrow files are memory-mapped. Labels are read without the images, and images are decoded
    here and not by `datasets`, from the bytes in the file or from the path of a regular file.
    Nothing is downloaded and no code of the data set is run. Images are checked as those of
    folders are: see `mulki.data.image_files.find_unreadable`.

    Args:
        path: the folder.
        image: the column of images, of the type `Image`. By default the only one, or of several
            the one called image or img.
        label: the column of labels, of the type `ClassLabel`. By default the only one, or of
            several the one called label or fine_label.
        templates: prompts; by default as of `mulki.data.folder_task`.
        skip_bad_images: leave unreadable images out and list them in `Task.skipped`.
        test_fraction: the share of the images to test on, in (0, 1), where there is no split yet.
        test_only: see `Task`; the split `train` may be missing.

    Raises:
        InputError: `datasets` is missing; no such folder, a missing split, a damaged file; no
            column of the type, or several; a label that is no class; classes that differ between
            the splits, one without training images, or one with one image where a part is held
            out; or what `Task` refuses.
        BadImage: an unreadable image or an empty row, unless skipped.
    """
    root = Path(path)
    templates = choose_templates(templates, root, f"templates for {root}")
    folders, test_fraction = _splits(root, test_fraction, test_only)
    validation = None if test_only else validation_split(root)
    every = folders if validation is None else [*folders, validation]
    splits, classes = [], None
    for folder in every:
        images, others = _read(folder, image, label)
        splits.append(images)
        classes = others if classes is None else classes
        if classes != others:
            names = folders[0].name, folder.name
            differing = classes_of_one_split(classes, others, names)
            raise InputError(
                f"{root}: {' and '.join(names)} have different classes "
                f"({differing or 'the same ones in another order'}); cast both to one ClassLabel "
                "and save them again"
            )
    assert classes is not None
    of_val = splits[len(folders) :]
    if of_val and not len(of_val[0]):
        raise InputError(
            f"{validation}: the split has no rows; add some, or leave the split out, and save again"
        )
    # Before unreadable images are left out, which would change the division.
    whole = divided(splits[: len(folders)], test_fraction, where=str(root), classes=classes)
    bad = find_unreadable([*whole, *of_val], skip_bad_images=skip_bad_images)
    train, test, *val = (images.without(bad) for images in (*whole, *of_val))
    if not test_only and (emptied := class_without_images(train, classes)) is not None:
        raise InputError(
            f"{folders[0]}: no readable train image of class {emptied}; add some, or take the name "
            "out of the ClassLabel"
        )
    return Task(
        Path(os.path.abspath(root)).name,
        tuple(name.replace("_", " ").strip() for name in classes),
        templates,
        train,
        test,
        tuple(bad),
        test_fraction,
        test_only,
        val[0] if val and len(val[0]) else None,
    )


def validation_split(root: Path) -> Path | None:
    """The folder of the split of validation images, beside the two others; None without one."""
    names = _split_names(root / _DICT) if (root / _DICT).is_file() else []
    val = split_name(names, "val")
    return root / val if val is not None and val != split_name(names, "test") else None


def _splits(
    root: Path, test_fraction: float | None, test_only: bool
) -> tuple[list[Path], float | None]:
    # The folders of the split to train on and of that to test on, or that of all images, or of
    # those to test on alone; and the share that is still to be held out.
    if not (root / _DICT).is_file():
        if not holds_dataset(root):
            raise InputError(
                f"{root}: no {_DICT} in it; give a folder that save_to_disk of datasets has written"
            )
        if test_fraction is not None:
            return [root], test_fraction
        raise InputError(
            f"{root}: one split, wanted train and test in a DatasetDict; divide it with "
            "dataset.train_test_split and save the result with save_to_disk, or pass "
            f"{OPTION}"
        )
    if (root / _STATE).exists():
        raise InputError(
            f"{root}: has {_DICT} and {_STATE}, of two data sets that were saved to one folder; "
            "save the one that is meant to a new folder"
        )
    # Folders of other splits may be left of a data set that was saved here before.
    names = _split_names(root / _DICT)
    train, test = (split_name(names, split) for split in ("train", "test"))
    if train is not None and test is not None:
        return [root / train, root / test], None
    if test_only and test is not None:
        return [root / test], None
    alone = train is not None and names == [train]
    if alone and test_fraction is not None:
        return [root / names[0]], test_fraction
    raise InputError(
        f"{root}: wanted the splits train and test (found: {', '.join(names) or 'none'}); rename "
        "them, or divide train with train_test_split, and save again"
        + (f", or pass {OPTION}" if alone else "")
    )


def _split_names(path: Path) -> list[str]:
    names = _json(path).get("splits")
    if not isinstance(names, list) or any(
        not isinstance(name, str) or name != Path(name).name for name in names
    ):
        raise _damaged(path, "no list of splits")
    return names


def _read(
    folder: Path, image: str | None, label: str | None
) -> tuple[ArrowImages, tuple[str, ...]]:
    # The images of a split, and the class names as they are written there.
    try:
        import datasets
        import pyarrow
        from datasets import ClassLabel, load_from_disk
    except ImportError as error:
        raise InputError(
            f"{folder}: a data set of Hugging Face is read with the package datasets, which cannot "
            f"be imported ({error}); pip install 'mulki[datasets]'"
        ) from None
    for file in _files(folder):
        _check_stream(file, pyarrow)
    try:
        rows: Any = load_from_disk(str(folder), keep_in_memory=False).with_format(None)
        features = rows.features
        image = _column(features, datasets.Image, image, _IMAGES, "image", folder)
        label = _column(features, ClassLabel, label, _LABELS, "label", folder)
        labels = rows.data.column(label).to_pylist()
        rows = rows.select_columns([image])
        rows = rows.cast_column(image, datasets.Image(decode=False))
        sizes, marks = _sizes_and_marks(rows.data.column(image))
        classes = tuple(map(str, features[label].names))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # datasets and pyarrow raise whatever they meet
        saved_as = _json(folder / _STATE).get("_format_type")
        if saved_as is not None:
            raise InputError(
                f"{folder}: saved with the format {saved_as}, which cannot be loaded here "
                f"({_in_one_line(error)}); call dataset.reset_format() and save it again"
            ) from None
        raise _damaged(folder, error) from None
    for place, target in enumerate(labels):
        if target is None or not 0 <= target < len(classes):
            came = "no label" if target is None else f"label {target}"
            unknown = ", which stands for one that is not known" if target == -1 else ""
            raise InputError(
                f"{folder}[{place}]: {came}{unknown}; wanted an index from 0 to "
                f"{len(classes) - 1}; correct it, or leave such rows out with dataset.filter"
            )
    places = tuple(range(len(labels)))
    return ArrowImages(folder, rows, image, places, sizes, marks, tuple(labels)), classes


def _files(folder: Path) -> list[Path]:
    # The Arrow files of a split.
    check_regular(folder / _INFO)
    state = _json(folder / _STATE)
    try:
        names = [each["filename"] for each in state["_data_files"]]
        if any(name != Path(name).name for name in names):
            raise ValueError("some files are outside the folder")
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(folder / _STATE, error) from None
    if not names:
        raise InputError(f"{folder}: the split has no rows; add some and save it again")
    return [folder / name for name in names]


def _check_stream(file: Path, pyarrow: Any) -> None:
    # Offsets that point outside the file would end the process when they are read. Encoded images
    # are not looked at here.
    check_regular(file)
    try:
        with file.open("rb") as stream:
            stream.seek(-len(_END), os.SEEK_END)
            if stream.read() != _END:
                raise ValueError("it is cut short")
        with pyarrow.memory_map(str(file)) as mapped:
            pyarrow.ipc.open_stream(mapped).read_all().validate(full=True)
    except MemoryError:
        raise
    except Exception as error:  # pyarrow's and the system's
        raise _damaged(file, error) from None


def _column(
    features: Mapping[str, Any],
    kind: type,
    given: str | None,
    preferred: Sequence[str],
    argument: str,
    folder: Path,
) -> str:
    # The column of a type.
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    for name in preferred if given is None else (given,):
        if name in found:
            return name
    if given is None and len(found) == 1:
        return found[0]
    if given is None and found:
        raise InputError(
            f"{folder}: several columns of type {kind.__name__} ({', '.join(found)}), none of them "
            f"called {' or '.join(preferred)}; leave the others out (dataset.remove_columns) and "
            f"save again, or pass {argument}=NAME to mulki.data.huggingface_task"
        )
    for name, of in features.items():
        if isinstance(getattr(of, "feature", None), kind) and given in (None, name):
            raise InputError(
                f"{folder}: the column {name} holds several labels an image (multi-label), which "
                "cannot be learned; make a column of one label each and save again"
            )
    there = ", ".join(
        f"{name}: {of.dtype if type(of).__name__ == 'Value' else type(of).__name__}"
        for name, of in features.items()
    )
    make = "class_encode_column(NAME)"
    if argument == "image":
        make = "cast_column(NAME, datasets.Image())"
    named = "" if given is None else f"{given} "
    raise InputError(
        f"{folder}: no column {named}of type {kind.__name__} (found: {there or 'nothing'}); make "
        f"one with dataset.{make} and save again"
    )


def _sizes_and_marks(cells: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    import pyarrow.compute as compute

    content, paths = (compute.struct_field(cells, name) for name in ("bytes", "path"))
    lengths = compute.binary_length(content).to_pylist()
    ends = compute.binary_slice(content, -_MARKED, None).to_pylist()
    sizes, marks = [], []
    for place, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        if length is None:
            path = paths[place].as_py() or ""
            # Of a file its name, which is the same wherever the folder lies.
            length, end = size_of(Path(path)) if path else 0, os.fsencode(Path(path).name)
        sizes.append(length)
        marks.append(zlib.crc32(end))
    return tuple(sizes), tuple(marks)


def _json(path: Path) -> dict[str, Any]:
    check_regular(path)
    try:
        found = from_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise _damaged(path, getattr(error, "strerror", None) or error) from None
    return found


def _damaged(path: Path, reason: object) -> InputError:
    return InputError(
        f"{path}: cannot be read ({_in_one_line(reason)}); save the data set again with its "
        "save_to_disk"
    )


def _in_one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:200] or type(reason).__name__
