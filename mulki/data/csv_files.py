"""CSV files of images with a text each, and a task from one of image paths and labels."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mulki.data.held_out import OPTION, divided
from mulki.data.image_files import (
    VALIDATION,
    ImageFiles,
    choose_templates,
    class_without_images,
    classes_of_one_split,
    find_unreadable,
)
from mulki.data.task import Task
from mulki.errors import InputError, nearest
from mulki.files import read_table

SPLITS = ("train", "test")
# The end of the name of a file that holds one split, with what separates it from the task's name.
_TRAIN = re.compile(r"[-_. ]?train$", re.IGNORECASE)


@dataclass(frozen=True)
class CsvForm:
    """How a CSV file is written.

    Attributes:
        image: the column of paths.
        text: the column of labels or captions; None for "label" and "caption".
        separator: between two cells.
    """

    image: str = "path"
    text: str | None = None
    separator: str = ","


@dataclass(frozen=True)
class SplitRow:
    """A row of a CSV file that a task is read from.

    Attributes:
        file: the image, relative to the folder of its CSV file, or absolute; with `/`.
        text: what is said of it, such as its label.
        split: train, test or val; empty where the file has no column for it.
        where: file and line, for messages.
    """

    file: str
    text: str
    split: str
    where: str


def csv_task(
    path: str | os.PathLike[str],
    *,
    templates: Sequence[str] | None = None,
    skip_bad_images: bool = False,
    test_fraction: float | None = None,
    test_only: bool = False,
    form: CsvForm = CsvForm(),
) -> Task:
    """Read a task from one CSV file, or from one for each split.

    A file is UTF-8 text, separated by commas, with a header. Its columns, in any order, are `path`
    (relative paths start at the CSV file's folder), `label` (the class name as prompts show it)
    and `split` (train, test, or val, valid or validation); other columns are ignored. Without a
    column `split` there are two or three files side by side: one whose name ends in `train.csv`,
    which is the one to give, one that ends in `test.csv`, and one that ends in `val.csv`,
    `valid.csv` or `validation.csv`, named alike otherwise. Validation images may be of some
    classes; where there are none to test on, they are those. Where there is one file alone, a part
    of each class is held out to test on, if `test_fraction` says how much: see
    `mulki.data.held_out.held_out`.

    The task is named after the file: `birds.csv` and `birds_train.csv` make "birds", `train.csv`
    is named after its folder. Classes are the labels, sorted. Images are checked as those of
    folders are: see `mulki.data.image_files.find_unreadable`.

    Args:
        path: the CSV file.
        templates: prompts; by default those of `prompts.txt` beside the CSV file (one a line,
            # comments), and without that file "a photo of a {}.".
        skip_bad_images: leave unreadable images out and list them in `Task.skipped`.
        test_fraction: the share of the images to test on, in (0, 1), where there is no split yet.
        test_only: see `Task`; rows to train on may be missing, or have labels that are not tested.
        form: of the file, with other names of columns and another separator.

    Raises:
        InputError: with file and line: a file that is missing or not such a CSV file, a missing
            column, an empty cell, an unknown split, an image that does not exist or is listed
            twice, fewer than two classes, classes that differ between train and test, a validation
            image of a class that is not learned, or a class with one image where a part is held
            out.
        BadImage: an unreadable image, unless skipped.
    """
    path = Path(path)
    name, rows = split_rows(path, "label", test_fraction, form, validation=VALIDATION)
    _check_rows(path.parent, rows)
    names = splits_of(rows)
    test_fraction = test_fraction if len(names) == 1 else None
    parts = [[row for row in rows if row.split == split] for split in names]
    tested = [part for part in parts if part] if test_only else parts
    classes, others = (sorted({row.text for row in part}) for part in (tested[0], tested[-1]))
    shared = [name for name in classes if name in others] if test_only else classes
    if differing := classes_of_one_split(shared, others):
        raise InputError(
            f"{path}: the train and the test images must have the same labels ({differing}); "
            "correct the labels or add rows"
        )
    if len(classes) < 2 and not test_only:
        raise InputError(f"{path}: only one label, {classes[0]}; at least two are needed")
    targets = {label: target for target, label in enumerate(classes)}
    validation = [row for row in rows if row.split == "val" and not test_only]
    for row in validation:
        if row.text not in targets:
            raise InputError(
                f"{row.where}: label {row.text} of a validation image, and no image to train on "
                "has it; correct the label, add such images or remove the row"
            )
    splits = [
        ImageFiles.of(path.parent, {row.file: targets[row.text] for row in part})
        for part in (*parts, validation)
    ]
    of_val = splits.pop()
    # Before unreadable images are left out, which would change the division.
    whole = divided(splits, test_fraction, where=str(path), classes=classes)
    bad = find_unreadable([*whole, of_val], skip_bad_images=skip_bad_images)
    train, test, val = (images.without(bad) for images in (*whole, of_val))
    for split, images in zip(SPLITS, (train, test), strict=True):
        if not test_only and (emptied := class_without_images(images, classes)) is not None:
            raise InputError(
                f"{path}: every {split} image of {emptied} is unreadable; add readable ones or "
                "remove the rows of this label"
            )
    chosen = choose_templates(templates, path.parent, f"templates for {path}")
    return Task(
        name,
        tuple(classes),
        chosen,
        train,
        test,
        tuple(bad),
        test_fraction,
        test_only,
        val if len(val) else None,
    )


def split_rows(
    path: Path,
    column: str,
    test_fraction: float | None,
    form: CsvForm = CsvForm(),
    validation: Sequence[str] = (),
) -> tuple[str, list[SplitRow]]:
    """The rows of a CSV file, or of one for each split, and the name of their task.

    The files are as `csv_task` has them, with another column in place of `label`. Whether images
    exist is not looked at.

    Args:
        path: of the file.
        column: of the text, where `form` names none.
        form: of the files.
        test_fraction: None where the rows, or a second file, have to say the split.
        validation: what validation images are called; empty where there may be none.

    Raises:
        InputError: with file and line: a file that is missing or not such a CSV file, a missing
            column, an empty cell, or an unknown split.
    """
    rows = _read(path, column, form, None, validation)
    if rows is not None:
        return path.stem, _with_test_images(rows)
    files = {path: ""}
    name, beside = path.stem, None
    if (end := _TRAIN.search(path.stem)) is not None:
        name = path.stem[: end.start()] or Path(os.path.abspath(path)).parent.name
        beside = _of_split(path, "test")
        others = {_of_split(path, word): "val" for word in validation} | {beside: "test"}
        if there := {file: split for file, split in others.items() if file.exists()}:
            files = {path: "train"} | there
    if len(files) == 1 and test_fraction is None:
        if beside is not None:
            raise InputError(
                f"{path}: has no column split, and there is no {beside.name} beside it; add one of "
                f"them, or pass {OPTION}"
            )
        raise InputError(
            f"{path}: has no column split; add one that says train or test, or make two files, "
            f"{path.stem}_train.csv and {path.stem}_test.csv, and give the first, or pass {OPTION}"
        )
    rows = []
    for file, split in files.items():
        found = _read(file, column, form, split, validation)
        if found is None:
            raise InputError(f"{file}: has a column split, and {path.name} has none; remove it")
        rows += found
    return name, _with_test_images(rows)


def csv_with_validation(path: Path, form: CsvForm = CsvForm()) -> bool:
    """Whether `csv_task` finds validation images in a file or beside it, and others to test on."""
    _, rows = split_rows(path, "label", 0.5, form, VALIDATION)  # with or without a split
    return any(row.split == "val" for row in rows)


def _of_split(train: Path, split: str) -> Path:
    # The file of a split beside that to train on, with capitals as in its name.
    letters = train.stem[-len("train") :]
    word = split if letters.islower() else split.upper() if letters.isupper() else split.title()
    return train.with_name(train.stem[: -len("train")] + word + train.suffix)


def _with_test_images(rows: list[SplitRow]) -> list[SplitRow]:
    # Where none are for tests, the validation images are.
    if any(row.split == "test" for row in rows):
        return rows
    return [replace(row, split="test") if row.split == "val" else row for row in rows]


def splits_of(rows: Sequence[SplitRow]) -> tuple[str, ...]:
    """Train and test; or the empty name alone where the file says no splits."""
    return SPLITS if rows[0].split else ("",)


def _read(
    path: Path, column: str, form: CsvForm, split: str | None, validation: Sequence[str]
) -> list[SplitRow] | None:
    """The rows of a file.

    Args:
        column: of their text, where `form` names none.
        form: of the file.
        split: the split of all rows, in a file that has no column for it; it may be empty. Where
            it is None and the file has no such column, or it is given and the file has one, the
            result is None.
        validation: as `split_rows`.
    """
    column = form.text or column
    wanted = f"a CSV file with the columns {form.image}, {column} and split"
    header, body = read_table(path, wanted, (form.image, column), ("split",), form.separator)
    if ("split" in header) != (split is None):
        return None
    if not body:
        raise InputError(f"{path}: has a header and no rows; add a row for each image")
    return [
        SplitRow(
            name_in(path.parent, row.cells[form.image]),
            row.cells[column],
            _split_of(row.cells["split"], row.where, validation) if split is None else split,
            row.where,
        )
        for row in body
    ]


def _split_of(split: str, where: str, validation: Sequence[str]) -> str:
    if split in validation:
        return "val"
    if split not in SPLITS:
        wanted = "train, test or val" if validation else "train or test"
        raise InputError(
            f'{where}: got the split "{split}"{nearest(split, (*SPLITS, *validation))}, wanted '
            f"{wanted}; correct it or remove the row"
        )
    return split


def name_in(folder: Path, path: str) -> str:
    """One name for a file however its path is written: a relative one if it is in the folder."""
    root, whole = os.path.abspath(folder), os.path.abspath(folder / path)
    inside = Path(whole).is_relative_to(root)
    return Path(os.path.relpath(whole, root) if inside else os.path.normpath(path)).as_posix()


def _check_rows(folder: Path, rows: Sequence[SplitRow]) -> None:
    first: dict[str, SplitRow] = {}
    for row in rows:
        if row.file in first:
            raise InputError(
                f"{row.where}: {row.file} is listed already ({first[row.file].where}); an image "
                "has one label and one split (no multi-label data), so remove one of the two rows"
            )
        first[row.file] = row
    check_images_exist(folder, rows)


def check_images_exist(folder: Path, rows: Sequence[SplitRow]) -> None:
    """Raise an InputError for the first row whose image does not exist."""
    missing = [row for row in rows if not os.path.isfile(folder / row.file)]
    if missing:
        more = f"; {len(missing) - 1} more like it" if len(missing) > 1 else ""
        raise InputError(
            f"{missing[0].where}: no file {folder / missing[0].file}; correct the path (relative "
            f"ones start at the folder of the CSV file){more}"
        )
