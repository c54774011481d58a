"""Tasks of images with captions: from a CSV file, a folder with one, or tar shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mulki.data.caption_task import CaptionedImages, CaptionTask
from mulki.data.captioned_shards import (
    JoinedShards,
    read_captioned_shards,
    shards_of_splits,
)
from mulki.data.csv_files import SPLITS, SplitRow, check_images_exist, split_rows
from mulki.data.image_files import ImageFiles, find_unreadable, size_of
from mulki.data.reference import CAPTIONS, images_below
from mulki.data.subset import Subset
from mulki.errors import InputError


def caption_task(path: str | os.PathLike[str], *, skip_bad_images: bool = False) -> CaptionTask:
    """Read a task of images with captions.

    A CSV file is as that of `csv_task`, with the column `caption` in place of `label`. An image may
    come several times, each time with another caption. A folder holds either such a file,
    ``captions.csv``, which has a row for every image in the folder; or ``train/`` and ``test/``
    with tar shards in webdataset layout, each image beside a text file of the same name,
    ``000000.jpg`` and ``000000.txt``; images with the same bytes are one image with the captions of
    all of them. The task is named after the file, as that of `csv_task`, or
    after the folder. Images are checked, see `mulki.data.image_files.find_unreadable`.

    Args:
        path: the CSV file or the folder.
        skip_bad_images: leave unreadable images out and list them in `Task.skipped`.

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
        name, rows = split_rows(path, "caption")
        return _of_rows(name, path.parent, rows, skip_bad_images)
    name = Path(os.path.abspath(path)).name
    if (path / CAPTIONS).is_file():
        _, rows = split_rows(path / CAPTIONS, "caption")
        without = sorted(images_below(path) - {row.file for row in rows})
        if without:
            more = f" and {len(without) - 1} more images" if len(without) > 1 else ""
            raise InputError(
                f"{path / CAPTIONS}: no row for {without[0]}{more}; add a row for each, or remove "
                "the images"
            )
        return _of_rows(name, path, rows, skip_bad_images)
    missing = f"neither a {CAPTIONS} nor tar shards in {{}}/; lay the images out as one of the two"
    read = [
        read_captioned_shards(shards, skip_bad_images=skip_bad_images)
        for shards in shards_of_splits(path, missing)
    ]
    train, test = (_of_shards(images, captions) for images, captions, _ in read)
    skipped = tuple(name for *_, names in read for name in names)
    return CaptionTask(name, _pairs(train), test, skipped)


def _of_shards(images: JoinedShards, captions: Sequence[str]) -> CaptionedImages:
    by_image: dict[int, list[str]] = {}
    for first, text in zip(images.firsts(), captions, strict=True):
        by_image.setdefault(first, []).append(text)
    each = tuple(tuple(dict.fromkeys(texts)) for texts in by_image.values())
    if len(each) == len(images):
        return CaptionedImages(images, each)
    return CaptionedImages(Subset(images, tuple(by_image)), each)


def _of_rows(
    name: str, folder: Path, rows: Sequence[SplitRow], skip_bad_images: bool
) -> CaptionTask:
    _check_rows(rows)
    check_images_exist(folder, rows)
    captions: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for row in rows:
        captions[row.split].setdefault(row.file, []).append(row.text)
    splits = [_files(folder, captions[split]) for split in SPLITS]
    bad = find_unreadable(splits, skip_bad_images=skip_bad_images)
    train, test = (
        CaptionedImages(kept, tuple(tuple(captions[split][file]) for file in kept.files))
        for split, images in zip(SPLITS, splits, strict=True)
        for kept in [images.without(bad)]
    )
    return CaptionTask(name, _pairs(train), test, tuple(bad))


def _pairs(images: CaptionedImages) -> CaptionedImages:
    # Each image once for each of its captions.
    places = [place for place, each in enumerate(images.captions) for _ in each]
    if len(places) == len(images):
        return images
    captions = tuple((text,) for each in images.captions for text in each)
    return CaptionedImages(Subset(images.images, places), captions)


def _files(folder: Path, captions: Mapping[str, Sequence[str]]) -> ImageFiles:
    sizes = tuple(size_of(folder / file) for file in captions)
    return ImageFiles(folder, tuple(captions), sizes, targets=(0,) * len(captions))


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
