"""Image files as an `ImageSet`, and the checks that folders and CSV files have in common."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TypeVar

from PIL import Image

from mulki.data.decoding import BadImage, decode, verify
from mulki.data.prompts import DEFAULT_TEMPLATES, check_templates, read_templates
from mulki.data.task import ImageSet, split_fingerprint
from mulki.errors import InputError

_Images = TypeVar("_Images", bound="EncodedImages")


class EncodedImages(ABC):
    """The base of dataclasses of encoded images; of their fields, the tuples are [n]."""

    sizes: tuple[int, ...]
    targets: tuple[int, ...]

    @abstractmethod
    def _source(self, index: int) -> Path | bytes:
        """The file of an image, or its bytes."""

    @abstractmethod
    def name(self, index: int) -> str:
        """As of `ImageSet`."""

    @abstractmethod
    def identities(self) -> Iterable[str]:
        """What of each image is the same wherever the set lies."""

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> Image.Image:
        return decode(self._source(index), self.name(index))

    def verify(self, index: int) -> None:
        """Raises BadImage as `mulki.data.decoding.verify`."""
        verify(self._source(index), self.name(index))

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        # Each step of a class-incremental sequence asks for that of the whole set.
        return split_fingerprint(zip(self.identities(), self.sizes, self.targets, strict=True))

    def without(self: _Images, names: Mapping[str, BadImage]) -> _Images:
        """The images whose `name` is not among these."""
        return self.chosen([self.name(i) not in names for i in range(len(self))])

    def chosen(self: _Images, chosen: Sequence[bool]) -> _Images:
        """The images whose place in `chosen`, [n], is true."""
        parts = {name: of for name, of in vars(self).items() if isinstance(of, tuple)}
        chosen_of = {name: tuple(compress(of, chosen)) for name, of in parts.items()}
        return replace(self, **chosen_of)  # type: ignore[type-var]


@dataclass(frozen=True)
class ImageFiles(EncodedImages):
    """Image files of one split; an `ImageSet`.

    Attributes:
        root: the folder that `files` are relative to.
        files: paths relative to it, with `/` on every system, [n]; they may also be absolute.
        sizes: bytes, [n].
        targets: class indices, [n].
    """

    root: Path
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def of(cls, root: Path, targets: Mapping[str, int]) -> ImageFiles:
        """Files that are there, by name their targets."""
        sizes = tuple(size_of(root / name) for name in targets)
        return cls(root, tuple(targets), sizes, tuple(targets.values()))

    def _source(self, index: int) -> Path:
        return self.root / self.files[index]

    def name(self, index: int) -> str:
        return str(self._source(index))

    def identities(self) -> tuple[str, ...]:
        return self.files


SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
#: What validation images are called, where others are called test.
VALIDATION = ("val", "valid", "validation")
_SPLIT_NAMES = {"train": ("train",), "test": ("test", *VALIDATION), "val": VALIDATION}

_told: ContextVar[Callable[[int, int], None]] = ContextVar("told", default=lambda done, total: None)


@contextmanager
def checks_reported(listener: Callable[[int, int], None]) -> Iterator[None]:
    """In the block, `find_unreadable` calls this with the images checked so far, and with all."""
    token = _told.set(listener)
    try:
        yield
    finally:
        _told.reset(token)


# Images that are given to the threads at a time. Progress is reported only once all of these are
# given out, which for all images at once takes longer than most of the checks.
_AHEAD = 1000


def find_unreadable(
    splits: Sequence[EncodedImages], *, skip_bad_images: bool
) -> dict[str, BadImage]:
    """Check every image as far as that is cheap, and return the errors by `name`.

    PNG is checked by its checksums, JPEG by its header and end, other formats by decoding. Damage
    inside a JPEG shows only when it is loaded.

    Raises:
        BadImage: there is an error, and `skip_bad_images` is false.
    """
    places = [(images, i) for images in splits for i in range(len(images))]

    def check(place: tuple[EncodedImages, int]) -> BadImage | None:
        images, index = place
        try:
            images.verify(index)
        except BadImage as error:
            return error
        return None

    # PIL loads most of its plug-ins when a file first needs one; a second thread that looks for one
    # at that moment can miss it and take its file for no image at all.
    Image.init()
    # Threads help: the work is reading files and decoding, both outside the interpreter lock.
    pool = ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) + 4))
    try:
        bad, tell, done = {}, _told.get(), 0
        for start in range(0, len(places), _AHEAD):
            part = places[start : start + _AHEAD]
            for (images, i), error in zip(part, pool.map(check, part), strict=True):
                if error is not None:
                    bad[images.name(i)] = error
                done += 1
                tell(done, len(places))
    finally:
        # An interrupt does not wait for the images to come.
        pool.shutdown(cancel_futures=True)
    if bad and not skip_bad_images:
        more = f"; {len(bad) - 1} more like it" if len(bad) > 1 else ""
        raise BadImage(f"{next(iter(bad.values()))}, or pass --skip-bad-images{more}")
    return bad


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split, "train", "test" or "val", which need not be there.

    Without one of exactly that name, it is the one whose name differs in capitals alone, and for
    the images to test on, one called ``val``, ``valid`` or ``validation``. That one holds the
    validation images where there is one called ``test``, too.
    """
    exact = root / split
    if exact.exists() or not root.is_dir():
        return exact
    try:
        folders = [path.name for path in root.iterdir() if path.is_dir()]
    except OSError:
        return exact
    return root / (split_name(folders, split) or split)


def validation_folder(root: Path) -> Path | None:
    """The folder of validation images; None where there is none beside the images to test on.

    One with neither folders nor shards in it counts as none.
    """
    folder = split_folder(root, "val")
    if not folder.is_dir() or folder == split_folder(root, "test"):
        return None
    return folder if any(map(_holds_images, visible(folder))) else None


def _holds_images(path: os.DirEntry[str]) -> bool:
    return is_folder(path) or path.name.lower().endswith(SHARD_SUFFIXES)


def split_name(names: Sequence[str], split: str) -> str | None:
    """The one of some names that stands for a split, as in `split_folder`; None if none does."""
    if split in names:
        return split
    for name in _SPLIT_NAMES[split]:
        found = [each for each in names if each.lower() == name]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def holds_split(root: Path) -> bool:
    """Whether a folder has one that is called as a split is, and holds folders or shards.

    One with images alone is that of a class of this name.
    """
    names = {name for each in _SPLIT_NAMES.values() for name in each}
    try:
        return any(
            _holds_images(each)
            for path in visible(root)
            if path.name.lower() in names and is_folder(path)
            for each in visible(path.path)
        )
    except InputError:
        return False


def visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name, but for names that begin with a dot.

    Raises:
        InputError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            found = [e for e in entries if not e.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from error
    return sorted(found, key=lambda e: e.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of `visible` is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False  # such as a link to itself, which the check of the image reports


def size_of(path: Path | os.DirEntry[str]) -> int:
    """Bytes of a file; 0 if that is not known, which the check of the image reports."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # the second for a name that no file can have
        return 0


def class_without_images(images: ImageSet, classes: Sequence[str]) -> str | None:
    """The first class that no image has."""
    present = set(images.targets)
    return next((name for i, name in enumerate(classes) if i not in present), None)


def classes_of_one_split(
    train: Sequence[str], test: Sequence[str], names: tuple[str, str] = ("train", "test")
) -> str:
    """Say which classes only one split, of these names, has; empty if there are none."""
    lonely = zip(names, (set(train) - set(test), set(test) - set(train)), strict=True)
    parts = [f"only in {split}: {', '.join(sorted(of))}" for split, of in lonely if of]
    return "; ".join(parts)


def choose_templates(given: Sequence[str] | None, folder: Path, where: str) -> tuple[str, ...]:
    """The prompts given, else those of `folder/prompts.txt`, else "a photo of a {}.".

    Raises:
        InputError: a template without exactly one `{}`; for those given it begins with `where`.
    """
    if given is not None:
        return check_templates(given, where)
    if (folder / "prompts.txt").exists():
        return read_templates(folder / "prompts.txt")
    return DEFAULT_TEMPLATES
