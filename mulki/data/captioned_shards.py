"""Tar shards in webdataset layout: `000000.jpg`, its caption `000000.txt` or class `000000.cls`."""

from __future__ import annotations

import filecmp
import hashlib
import io
import re
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, compress
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from PIL import Image

from mulki.choices.options import whole_number
from mulki.data.image_files import (
    SHARD_SUFFIXES,
    find_unreadable,
    holds_split,
    split_folder,
    visible,
)
from mulki.data.shards import (
    GZIP,
    IMAGE_KINDS,
    Member,
    Samples,
    ShardImages,
    image_of,
    read_samples,
)
from mulki.errors import InputError
from mulki.files import check_regular, gunzip

# What stands beside an image, by the suffix of its file.
_KINDS = {"txt": "caption", "cls": "class"}
# Bytes in the middle of an image that are read before all of it is.
_GLANCE = 256
_Words = TypeVar("_Words")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Loadable(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """As RGB. Raises BadImage."""

    def name(self, index: int) -> str:
        """For messages and tables."""


_Part = TypeVar("_Part", bound=Loadable)


@dataclass(frozen=True)
class Joined(Generic[_Part]):
    """Several sets of images, one after another."""

    parts: tuple[_Part, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def load(self, index: int) -> Image.Image:
        part, place = self._find(index)
        return part.load(place)

    def name(self, index: int) -> str:
        part, place = self._find(index)
        return part.name(place)

    def _find(self, index: int) -> tuple[_Part, int]:
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


@dataclass(frozen=True)
class JoinedShards(Joined[ShardImages]):
    """The images of several shards, one after another; an `ImageSet`."""

    @cached_property
    def targets(self) -> tuple[int, ...]:
        return tuple(target for part in self.parts for target in part.targets)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names of shard and member, such as ``0.tar:000000.jpg``, [n]."""
        return tuple(f"{part.path.name}:{name}" for part in self.parts for name in part.members)

    def chosen(self, chosen: Sequence[bool]) -> JoinedShards:
        """The images whose place in `chosen`, [n], is true."""
        starts = [0, *self._ends]
        return JoinedShards(
            tuple(
                part.chosen(chosen[start : start + len(part)])
                for part, start in zip(self.parts, starts, strict=False)
            )
        )

    def fingerprint(self) -> str:
        """Hex SHA-256 that identifies the images: the same wherever the shards lie."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(" ".join(p.fingerprint() for p in self.parts).encode()).hexdigest()

    def firsts(self) -> list[int]:
        """Of each image the place of the first one with the same bytes, mostly its own."""
        found = list(range(len(self)))
        groups = [list(found)]
        # By ever more of their bytes, so that few images are read.
        for part in (self._size, self._middle, self._digest):
            groups = [same for group in groups for same in _alike(group, part) if len(same) > 1]
        for first, *others in groups:
            for place in others:
                found[place] = first
        return found

    def _size(self, index: int) -> int:
        part, place = self._find(index)
        return part.sizes[place]

    def _middle(self, index: int) -> bytes:
        part, place = self._find(index)
        return part.read(place, part.sizes[place] // 2, _GLANCE)

    def _digest(self, index: int) -> bytes:
        part, place = self._find(index)
        return hashlib.sha256(part.read(place)).digest()


def _alike(places: Sequence[int], part: Callable[[int], Hashable]) -> list[list[int]]:
    by_part: dict[Hashable, list[int]] = {}
    for place in places:
        by_part.setdefault(part(place), []).append(place)
    return list(by_part.values())


def find_shards(path: Path) -> list[Path]:
    """The shards that a path names, in order; none where it names something else.

    Args:
        path: a tar file, plain or gzipped, a folder with such files in it, or a range of them as
            ``cc3m-{00000..00331}.tar``.
    """
    if found := _RANGE.search(path.name):
        first, last = found.groups()
        before, behind = path.name[: found.start()], path.name[found.end() :]
        numbers = range(int(first), int(last) + 1)
        return [path.with_name(f"{before}{n:0{len(first)}d}{behind}") for n in numbers]
    if path.is_dir():
        return [path / e.name for e in visible(path) if _is_shard(path / e.name)]
    return [path] if _is_shard(path) else []


def shards_of_task(
    folder: Path, missing: str, test_fraction: float | None, *, test_only: bool = False
) -> tuple[list[list[Path]], float | None]:
    """The shards in `folder/train` and in `folder/test`, or what stands for it (`split_folder`).

    Args:
        folder: of the task.
        missing: what is said of a split without shards, with a {} for its name.
        test_fraction: None where there have to be two splits. Otherwise the shards in `folder`
            itself are taken if there is neither.
        test_only: whether those to train on may be missing.

    Returns:
        The shards of each split, or all of them, and the share that is still to be held out.

    Raises:
        InputError: a split without shards, or a shard that is in both.
    """
    if test_fraction is not None and not holds_split(folder) and (whole := find_shards(folder)):
        return [whole], test_fraction
    splits = {split: split_folder(folder, split) for split in ("train", "test")}
    found = [find_shards(path) if path.is_dir() else [] for path in splits.values()]
    for split, shards in zip(splits, found, strict=True):
        if not shards and not (test_only and split == "train" and not splits[split].exists()):
            raise InputError(f"{folder}: {missing.format(split)}")
    train, test = found
    check_distinct(test, train)
    return found, None


def check_distinct(tested: Sequence[Path], others: Sequence[Path]) -> None:
    """Raise an InputError for a shard that is among others too, by its content."""
    for one in tested:
        for other in others:
            same_size = one.stat().st_size == other.stat().st_size
            if same_size and filecmp.cmp(one, other, shallow=False):
                raise InputError(
                    f"{one}: has the content of {other}; a model is tested on images that it has "
                    "not learned, so leave it in one"
                )


def _is_shard(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(SHARD_SUFFIXES) and path.is_file()


def read_captioned_shards(
    paths: Sequence[Path], *, captions: bool = True, skip_bad_images: bool
) -> tuple[JoinedShards, tuple[str, ...], tuple[str, ...]]:
    """Images of shards, their captions, and the names of those that are unreadable: see `readable`.

    Images are checked as files are, see `mulki.data.image_files.find_unreadable`.

    Args:
        captions: whether each image needs one; if not, there are none.
        skip_bad_images: whether there may be unreadable images.

    Raises:
        InputError: a shard is missing or damaged, or has an image without a caption, a caption
            without an image or an empty one.
        BadImage: an unreadable image, unless skipped.
    """
    parts, words, bad = _read(paths, "txt" if captions else None, skip_bad_images)
    return JoinedShards(tuple(parts)), tuple(chain(*words)), bad


def read_classed_shards(
    paths: Sequence[Path], count: int, *, skip_bad_images: bool
) -> tuple[JoinedShards, tuple[str, ...]]:
    """Images of shards with their class indices, `000000.cls` beside `000000.jpg`.

    Args:
        count: of the classes, C.
        skip_bad_images: whether there may be unreadable images.

    Returns:
        The images, and the names of those that are unreadable.

    Raises:
        InputError, BadImage: as `read_captioned_shards`, or no index in 0..C-1.
    """
    parts, words, bad = _read(paths, "cls", skip_bad_images)
    for number, (part, texts) in enumerate(zip(parts, words, strict=True)):
        targets = []
        for place, text in enumerate(texts):
            target = whole_number(text)
            if len(text.strip(" []").replace(",", " ").split()) > 1:
                raise InputError(
                    f"{part.name(place)}: classes {text[:20]!r}, wanted one: data with several "
                    "labels an image (multi-label) cannot be learned; keep one of them"
                )
            if target is None or target >= count:
                raise InputError(
                    f"{part.name(place)}: class {text[:20]!r}, wanted a number from 0 to "
                    f"{count - 1}; correct its .cls, or add the class"
                )
            targets.append(target)
        parts[number] = replace(part, targets=tuple(targets))
    return JoinedShards(tuple(parts)), bad


def readable(
    images: JoinedShards, words: Sequence[_Words], bad: Collection[str]
) -> tuple[JoinedShards, tuple[_Words, ...]]:
    """The images whose names are not among those of unreadable ones, and their words."""
    kept = [images.name(i) not in bad for i in range(len(images))]
    return images.chosen(kept), tuple(compress(words, kept))


def open_shards(paths: Sequence[Path]) -> JoinedShards:
    """The images of shards, whether they can be read or not.

    Raises:
        InputError: a shard is missing or damaged.
    """
    return JoinedShards(tuple(_open(path, None)[0] for path in paths))


def _read(
    paths: Sequence[Path], suffix: str | None, skip_bad_images: bool
) -> tuple[list[ShardImages], list[list[str]], tuple[str, ...]]:
    # The images of each shard, the words of that suffix beside them, and what is unreadable.
    opened = [_open(path, suffix) for path in paths]
    bad = find_unreadable([images for images, _ in opened], skip_bad_images=skip_bad_images)
    parts, words = map(list, zip(*opened, strict=True))
    return parts, words, tuple(bad)


def _open(path: Path, suffix: str | None) -> tuple[ShardImages, list[str]]:
    # The images of a shard, and the words beside them if they are needed.
    check_regular(path)
    words: list[str] = []
    try:
        with path.open("rb") as file:
            unpacked = None
            if file.read(len(GZIP)) == GZIP:
                file.seek(0)
                unpacked = gunzip(path, file.read())
            file.seek(0)
            content = file if unpacked is None else io.BytesIO(unpacked)
            samples = read_samples(content)
            images = {key: image for key, files in samples.items() if (image := image_of(files))}
            for key in samples.keys() - images.keys():
                _check_dots(path, samples[key], IMAGE_KINDS)
            if suffix is not None:
                _check_pairs(path, samples, images, suffix)
                for key in images:
                    text = samples[key][suffix]
                    content.seek(text.offset)
                    words.append(_words(path, content.read(text.size), text.name, suffix))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; correct the path") from None
    except (tarfile.TarError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); get the shard again") from None
    return ShardImages.of(path, list(images.values()), (0,) * len(images), unpacked), words


def _check_pairs(path: Path, samples: Samples, images: dict[str, Member], suffix: str) -> None:
    kind = _KINDS[suffix]
    for key, files in samples.items():
        if (suffix in files) != (key in images):
            has = f"an image and no {kind} (.{suffix})"
            if suffix in files:
                has = f"a {kind} and no image"
            raise InputError(f"{path}: {key} has {has}; add what is missing, or remove {key}")
        if suffix not in files:
            _check_dots(path, files, {suffix})


def _check_dots(path: Path, files: Mapping[str, Member], kinds: Collection[str]) -> None:
    # Of a sample without a file of these kinds.
    for end, member in files.items():
        if end.rpartition(".")[2] in kinds:
            raise InputError(
                f"{path}: {member.name}: what follows the first dot of a name says the kind of "
                "file in a shard; name it without further dots"
            )


def _words(path: Path, content: bytes, name: str, suffix: str) -> str:
    try:
        words = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason}") from None
    if not words:
        raise InputError(
            f"{path}: the {_KINDS[suffix]} {name} is empty; fill it in, or remove its image"
        )
    return words
