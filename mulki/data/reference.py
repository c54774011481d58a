"""Reference sets: images with captions beside the tasks, on which some methods distil."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mulki.data.captioned_shards import find_shards, read_captioned_shards, readable
from mulki.data.csv_files import name_in
from mulki.data.decoding import SUFFIXES, BadImage
from mulki.data.image_files import ImageFiles, find_unreadable
from mulki.data.prompts import fill
from mulki.data.task import ImageSet
from mulki.data.vocabulary import TEMPLATE, Vocabulary
from mulki.errors import InputError
from mulki.files import Row, read_table

CAPTIONS = "captions.csv"
# Seed of the order of words as captions.
_WORD_ORDER = 0
_WANTED = (
    f"a CSV with the columns path and caption, a folder of images with {CAPTIONS}, tar shards, "
    f"current or made"
)


@dataclass(frozen=True)
class ReferenceSet:
    """Images, each with a caption, or images alone.

    Args:
        images: n images; their targets are not used.
        captions: [n], or None for a method that looks at none.
        skipped: unreadable images that were left out, by path.

    Raises:
        InputError: no image.
    """

    images: ImageSet
    captions: tuple[str, ...] | None
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.images):
            raise InputError("--reference: the set is empty; add images with captions")

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Hex SHA-256 of images and captions, the same wherever the files lie."""
        content = json.dumps([self.images.fingerprint(), *(self.captions or ())])
        return hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def with_words(cls, images: ImageSet, vocabulary: Vocabulary | None) -> ReferenceSet:
        """Images, each with a word of a vocabulary as its caption.

        The words come in a pseudo-random order, the same in every run, and again from its beginning
        when it has ended. So every word is used about equally often, and what a word means has
        nothing to do with the image's class: as in ZSCL, whose sentences do not belong to its
        images.

        Args:
            vocabulary: None for images alone.
        """
        if vocabulary is None:
            return cls(images, None)
        words = list(vocabulary.words)
        random.Random(_WORD_ORDER).shuffle(words)
        captions = (fill(TEMPLATE, words[place % len(words)]) for place in range(len(images)))
        return cls(images, tuple(captions))


def read_reference(
    path: str | os.PathLike[str], *, captions: bool = True, skip_bad_images: bool = False
) -> ReferenceSet:
    """Read a reference set.

    Images are checked as those of tasks are: see `mulki.data.image_files.find_unreadable`.

    Args:
        path: a CSV file with the columns ``path`` and ``caption``, whose paths are absolute or
            relative to the folder of the file; or a folder with such a file, ``captions.csv``, that
            has a row for every image in the folder; or tar shards, see
            `mulki.data.captioned_shards`. Hidden files and folders are passed over.
        captions: False where no captions are needed: then a folder needs no `captions.csv`, and all
            of its images are read.
        skip_bad_images: leave unreadable images out and list them in `ReferenceSet.skipped`.

    Raises:
        InputError: no such file or folder, a CSV that cannot be read, an image without a caption, a
            caption without an image, or an empty set.
        BadImage: an unreadable image, unless skipped.
    """
    if not os.fspath(path):
        raise InputError(f"--reference: got an empty path, wanted {_WANTED}")
    path = Path(path)
    if shards := find_shards(path):
        return _of_shards(path, shards, captions, skip_bad_images)
    if not path.exists():
        raise InputError(f"--reference: no file or folder {path}; pass {_WANTED}")
    if not captions and path.is_dir():
        return _checked(path, dict.fromkeys(sorted(images_below(path))), skip_bad_images)
    file = path / CAPTIONS if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise InputError(
            f"--reference: {path} has {len(images_below(path))} images and no captions; add "
            f"{CAPTIONS} with the columns path and caption"
        )
    by_image = _read_captions(file)
    missing = sorted(images_below(path) - by_image.keys()) if path.is_dir() else []
    if missing:
        more = f" and {len(missing) - 1} more images" if len(missing) > 1 else ""
        raise InputError(
            f"--reference: {file} has no caption for {missing[0]}{more}; add a line for each, or "
            f"remove the images"
        )
    found: Mapping[str, str | None] = by_image if captions else dict.fromkeys(by_image)
    return _checked(file.parent, found, skip_bad_images)


def _of_shards(
    path: Path, shards: list[Path], captions: bool, skip_bad_images: bool
) -> ReferenceSet:
    if path.is_dir() and ((path / CAPTIONS).exists() or images_below(path)):
        raise InputError(
            f"--reference: {path} has shards ({shards[0].name}) and images or {CAPTIONS}; move one "
            f"of them to a folder of its own"
        )
    try:
        images, words, bad = read_captioned_shards(
            shards, captions=captions, skip_bad_images=skip_bad_images
        )
    except BadImage:
        raise
    except InputError as error:
        raise InputError(f"--reference: {error}") from None
    kept, of_kept = readable(images, words, {*bad})
    return ReferenceSet(kept, of_kept if captions else None, bad)


def _checked(
    folder: Path, captions: Mapping[str, str | None], skip_bad_images: bool
) -> ReferenceSet:
    # The readable images among those of `captions`, which has None for each where none is needed.
    images = ImageFiles.of(folder, dict.fromkeys(captions, 0))
    bad = find_unreadable([images], skip_bad_images=skip_bad_images)
    kept = images.without(bad)
    words = tuple(word for name in kept.files if (word := captions[name]) is not None)
    return ReferenceSet(kept, words or None, tuple(bad))


def images_below(folder: Path) -> set[str]:
    """The images in a folder and its folders, relative to it with `/`; hidden ones left out.

    Links to folders are followed after the folders themselves, so that each is found once.
    """
    found: set[str] = set()
    seen: set[str] = set()
    tops = [str(folder)]
    for top in tops:
        for root, folders, files in os.walk(top):
            real = os.path.realpath(root)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = [os.path.join(root, name) for name in folders]
            tops += filter(os.path.islink, inside)
            for name in files:
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                    found.add(Path(root, name).relative_to(folder).as_posix())
    return found


def _read_captions(file: Path) -> dict[str, str]:
    # Captions by path.
    captions: dict[str, str] = {}
    try:
        wanted = "a CSV with the columns path and caption"
        for row in read_table(file, wanted, ("path", "caption"))[1]:
            _add_caption(captions, row, file.parent)
    except InputError as error:
        raise InputError(f"--reference: {error}") from None
    return captions


def _add_caption(captions: dict[str, str], row: Row, folder: Path) -> None:
    name = name_in(folder, row.cells["path"])
    if not os.path.isfile(folder / name):
        raise InputError(
            f"{row.where}: no image {name!r} for its caption; correct the path (relative to "
            f"{folder}), or remove the row"
        )
    if name in captions:
        raise InputError(f"{row.where}: {name} has a caption already; remove one of them")
    captions[name] = row.cells["caption"]
