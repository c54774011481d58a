"""Tasks of images with captions: from a CSV file, a folder with one, or tar shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

from mulki.data.caption_task import CaptionedImages, CaptionTask
from mulki.data.captioned_shards import (
    JoinedShards,
    read_captioned_shards,
    readable,
    shards_of_task,
)
from mulki.data.csv_files import CsvForm, SplitRow, check_images_exist, split_rows, splits_of
from mulki.data.held_out import divided, held_out
from mulki.data.image_files import ImageFiles, find_unreadable
from mulki.data.reference import CAPTIONS, images_below
from mulki.data.subset import Subset
from mulki.errors import InputError

_Said = tuple[int, str]


def caption_task(
    path: str | os.PathLike[str],
    *,
    skip_bad_images: bool = False,
    test_fraction: float | None = None,
    test_only: bool = False,
    form: CsvForm = CsvForm(),
) -> CaptionTask:
    """Read a task of images with captions.

    A CSV file is as that of `csv_task`, with the column `caption` in place of `label`. An image may
    come several times, each time with another caption, all of them in one split. A folder holds
    either such a file, ``captions.csv``, which has a row for every image in the folder; or
    ``train/`` and ``test/`` with tar shards in webdataset layout, each image beside a text file of
    the same name, ``000000.jpg`` and ``000000.txt``; images with the same bytes are one image with
    the captions of all of them. The task is named after the file, as that of `csv_task`, or after
    the folder. Images are checked, see `mulki.data.image_files.find_unreadable`.

    Args:
        path: the CSV file or the folder.
        skip_bad_images: leave unreadable images out and list them in `Task.skipped`.
        test_fraction: the share of the images to test on, in (0, 1), of a CSV file that says no
            splits, or of shards in the folder itself: see `mulki.data.held_out.held_out`.
        test_only: see `mulki.data.task.Task`; rows or shards to train on may be missing.
        form: of a CSV file, with other names of columns and another separator.

    Raises:
        InputError: what is wrong, with file and line: a missing file, a missing column, an empty
            caption, an image without a caption or the reverse, a pair that is listed twice, an
            image in both splits, a damaged shard, or what `CaptionTask` refuses.
        BadImage: an unreadable image, unless skipped.
    """
    wanted = "a CSV file with the columns path, caption and split, or a folder"
    if not os.fspath(path):
        raise InputError(f"captions: got an empty path; pass {wanted}")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; pass {wanted}")
    if not path.is_dir():
        name, rows = split_rows(path, "caption", test_fraction, form)
        return _of_rows(name, path, rows, skip_bad_images, test_fraction, test_only)
    name = Path(os.path.abspath(path)).name
    if (path / CAPTIONS).is_file():
        _, rows = split_rows(path / CAPTIONS, "caption", test_fraction, form)
        without = sorted(images_below(path) - {row.file for row in rows})
        if without:
            more = f" and {len(without) - 1} more images" if len(without) > 1 else ""
            raise InputError(
                f"{path / CAPTIONS}: no row for {without[0]}{more}; add a row for each, or remove "
                "the images"
            )
        return _of_rows(name, path / CAPTIONS, rows, skip_bad_images, test_fraction, test_only)
    missing = f"neither a {CAPTIONS} nor tar shards in {{}}/; lay the images out as one of the two"
    found, test_fraction = shards_of_task(path, missing, test_fraction, test_only=test_only)
    read = [
        read_captioned_shards(shards, skip_bad_images=skip_bad_images) for shards in found if shards
    ]
    skipped = tuple(name for *_, names in read for name in names)
    parts = [part for images, _, _ in read for part in images.parts]
    # Each caption with the place of the first image that has the bytes of its own.
    firsts = JoinedShards(tuple(parts)).firsts()
    said = list(zip(firsts, (text for _, each, _ in read for text in each), strict=True))
    if test_fraction is not None:
        splits = _divided(read[0][0], said, test_fraction, str(path))
    else:
        train_images, test_images = read[0][0], read[-1][0]
        if not found[0]:  # nothing to learn
            train_images = test_images.chosen([False] * len(test_images))
        count = len(train_images)
        for place, (first, _) in enumerate(said[count:]):
            if first < count:
                raise InputError(
                    f"{path}: {test_images.name(place)} has the content of "
                    f"{train_images.name(first)}; a model is tested on images that it has not "
                    "learned, so leave it in one"
                )
        splits = [(train_images, said[:count]), (test_images, said[count:])]
    train, test = (_of_shards(*readable(*split, {*skipped})) for split in splits)
    return CaptionTask(name, _pairs(train), test, skipped, test_fraction, test_only)


def _divided(
    images: JoinedShards, said: Sequence[_Said], test_fraction: float, where: str
) -> list[tuple[JoinedShards, list[_Said]]]:
    # Those to train on and those to test on. Images with the same bytes stay together.
    places = sorted({first for first, _ in said})
    names = [images.files[place] for place in places]
    chosen = held_out(names, [0] * len(names), test_fraction, where=where)
    tested = dict(zip(places, chosen, strict=True))
    sides = ([tested[first] is side for first, _ in said] for side in (False, True))
    return [(images.chosen(side), list(compress(said, side))) for side in sides]


def _of_shards(images: JoinedShards, said: Sequence[_Said]) -> CaptionedImages:
    places: dict[int, int] = {}
    texts: dict[int, dict[str, None]] = {}
    for place, (first, text) in enumerate(said):
        places.setdefault(first, place)
        texts.setdefault(first, {})[text] = None
    each = tuple(map(tuple, texts.values()))
    if len(each) == len(images):
        return CaptionedImages(images, each)
    return CaptionedImages(Subset(images, tuple(places.values())), each)


def _of_rows(
    name: str,
    file: Path,
    rows: Sequence[SplitRow],
    skip_bad_images: bool,
    test_fraction: float | None,
    test_only: bool,
) -> CaptionTask:
    _check_rows(rows)
    check_images_exist(file.parent, rows)
    names = splits_of(rows)
    test_fraction = test_fraction if len(names) == 1 else None
    captions: dict[str, list[str]] = {}
    for row in rows:
        captions.setdefault(row.file, []).append(row.text)
    splits = [
        ImageFiles.of(file.parent, {row.file: 0 for row in rows if row.split == split})
        for split in names
    ]
    # Before unreadable images are left out, which would change the division.
    parts = divided(splits, test_fraction, where=str(file))
    bad = find_unreadable(parts, skip_bad_images=skip_bad_images)
    train, test = (
        CaptionedImages(images, tuple(tuple(captions[name]) for name in images.files))
        for images in (part.without(bad) for part in parts)
    )
    return CaptionTask(name, _pairs(train), test, tuple(bad), test_fraction, test_only)


def _pairs(images: CaptionedImages) -> CaptionedImages:
    # Each image once for each of its captions.
    places = [place for place, each in enumerate(images.captions) for _ in each]
    if len(places) == len(images):
        return images
    captions = tuple((text,) for each in images.captions for text in each)
    return CaptionedImages(Subset(images.images, places), captions)


def _check_rows(rows: Sequence[SplitRow]) -> None:
    first: dict[str, SplitRow] = {}
    pairs: dict[tuple[str, str], SplitRow] = {}
    for row in rows:
        before = first.setdefault(row.file, row)
        same = pairs.setdefault((row.file, row.text), row)
        if before.split != row.split:
            raise InputError(
                f"{row.where}: {row.file} is in the {before.split} split already ({before.where}); "
                "a model is tested on images that it has not learned, so leave it in one"
            )
        if same is not row:
            raise InputError(
                f"{row.where}: {row.file} is listed with this caption already ({same.where}); "
                "remove one of the two rows"
            )
