"""Tar shards in webdataset layout (`000000.webp`, `000000.cls`), read by random access.

A shard of small images may be gzipped, because a tar header can be larger than such an image.

A pack is a folder with `tasks.json` beside its shards:

    {"format": 1, "image_size": 64,
     "tasks": {NAME: {"classes": [...], "templates": [...],
                      "train": {"file": ..., "count": ..., "sha256": ...}, "test": {...}}},
     "orders": {"I": [NAME, ...], ...}}
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from mulki.data.decoding import SUFFIXES
from mulki.data.image_files import EncodedImages
from mulki.data.task import Task
from mulki.errors import InputError
from mulki.files import check_regular, gunzip

_FORMAT = 1
GZIP = b"\x1f\x8b"
IMAGE_KINDS = frozenset(suffix[1:] for suffix in SUFFIXES)
# Beside one of these, another kind of image is a mask or the like.
_USUAL = frozenset({"jpeg", "jpg", "png", "webp"})
_OF_SAMPLES = IMAGE_KINDS | {"cls", "txt"}


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


# The files of a shard by key, a path up to the first dot of its name, and by suffix, what follows.
Samples = dict[str, dict[str, Member]]


@dataclass(frozen=True)
class ShardImages(EncodedImages):
    """The images of one tar shard, plain or gzipped; an `ImageSet`.

    Attributes:
        path: the tar file.
        members: image members, [n].
        offsets, sizes: where each member's bytes lie in the file, [n].
        targets: class indices, [n].
        unpacked: the content of the tar where the file is gzipped, which has no random access.
    """

    path: Path
    members: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    targets: tuple[int, ...]
    unpacked: bytes | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls, path: Path, members: Sequence[Member], targets: Sequence[int], unpacked: bytes | None
    ) -> ShardImages:
        """The images that some members of a shard are."""
        return cls(
            path,
            tuple(member.name for member in members),
            tuple(member.offset for member in members),
            tuple(member.size for member in members),
            tuple(targets),
            unpacked,
        )

    def _source(self, index: int) -> bytes:
        return self.read(index)

    def name(self, index: int) -> str:
        return f"{self.path}:{self.members[index]}"

    def identities(self) -> tuple[str, ...]:
        return self.members

    def read(self, index: int, start: int = 0, count: int | None = None) -> bytes:
        """The bytes of an image from byte `start` on, at most `count` of them."""
        size = self.sizes[index]
        end = self.offsets[index] + (size if count is None else min(start + count, size))
        start += self.offsets[index]
        if self.unpacked is not None:
            return self.unpacked[start:end]
        # Opened for each read: a kept handle would share its position with forked workers and
        # threads and could not be pickled, and opening costs far less than decoding.
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            reason = error.strerror or "no reason given"
            raise InputError(
                f"{self.path}: cannot be read any more ({reason}); put it back and start again"
            ) from error


@dataclass(frozen=True)
class Pack:
    """Tasks stored in shards, and the orders in which they may be learned.

    Attributes:
        root: the folder.
        tasks, orders: those of `tasks.json`, see above.
    """

    root: Path
    tasks: dict[str, Any]
    orders: dict[str, tuple[str, ...]]

    def task(self, name: str) -> Task:
        """Read a task; `name` is a key of `tasks`.

        Raises:
            InputError: a shard is missing or is not the one that `tasks.json` describes.
        """
        described = self.tasks[name]
        train, test = (
            open_shard(
                self.root / described[split]["file"],
                sha256=described[split]["sha256"],
                count=described[split]["count"],
            )
            for split in ("train", "test")
        )
        return Task(name, tuple(described["classes"]), tuple(described["templates"]), train, test)


def open_pack(root: Path) -> Pack:
    """Read `root/tasks.json`; shards are opened when a task is asked for.

    Raises:
        InputError: missing, damaged, or of another format.
    """
    path = root / "tasks.json"
    check_regular(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise InputError(
                f"{path}: format {data['format']}, wanted {_FORMAT}; "
                "install the version of mulki that wrote it"
            )
        for entry in data["tasks"].values():
            _ = entry["classes"], entry["templates"]
            for split in ("train", "test"):
                _ = [entry[split][key] for key in ("file", "count", "sha256")]
        orders = {order: tuple(names) for order, names in data["orders"].items()}
        for names in orders.values():
            _ = [data["tasks"][name] for name in names]
        return Pack(root, data["tasks"], orders)
    except FileNotFoundError as error:
        raise _damaged(path, "missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    except KeyError as error:
        raise _damaged(path, f"entry {error} missing") from error
    except (AttributeError, TypeError) as error:
        raise _damaged(path, "not laid out as a pack") from error


def open_shard(path: Path, *, sha256: str | None = None, count: int | None = None) -> ShardImages:
    """Index a tar shard.

    An unchanged file is hashed and indexed once per process; further calls cost nothing.

    Args:
        path: the tar file.
        sha256: hex digest that the file must have.
        count: number of images that it must hold.

    Raises:
        InputError: missing, damaged, or not as described.
    """
    check_regular(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise _damaged(path, "missing") from error
    return _open_shard(path, sha256, count, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _open_shard(
    path: Path, sha256: str | None, count: int | None, _size: int, _mtime: int
) -> ShardImages:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or "cannot be read") from error
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise _damaged(path, f"checksum {found[:12]}..., wanted {sha256[:12]}...")
    unpacked = None
    try:
        if content.startswith(GZIP):
            content = unpacked = gunzip(path, content)
        samples = read_samples(io.BytesIO(content))
        targets = {
            key: int(content[label.offset : label.offset + label.size])
            for key, files in samples.items()
            if (label := files.get("cls"))
        }
    except (tarfile.TarError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    images = {key: image for key, files in samples.items() if (image := image_of(files))}
    if unpaired := sorted(images.keys() ^ targets.keys()):
        raise _damaged(path, f"{unpaired[0]} lacks its image or its .cls")
    if count is not None and len(images) != count:
        raise _damaged(path, f"{len(images)} images, wanted {count}")
    if not images:
        raise _damaged(path, "no images")
    keys = sorted(images)
    members, classes = [images[key] for key in keys], [targets[key] for key in keys]
    return ShardImages.of(path, members, classes, unpacked)


def read_samples(file: BinaryIO) -> Samples:
    """The files of a tar that are not hidden, grouped as webdataset does; not their bytes.

    Raises:
        tarfile.TarError: damaged, cut short, with a file that comes twice, or with a link to what
            is not there.
    """
    samples: Samples = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while entry := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                _add_member(samples, entry)
            # tarfile takes a damaged header for the end.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end of the archive at byte {tar.offset}")
    except OverflowError:
        raise tarfile.ReadError("a member that is larger than any file") from None
    return samples


def _add_member(samples: Samples, entry: tarfile.TarInfo) -> None:
    key, suffix = _sample_of(entry.name)
    if key.endswith("/") or not key or not suffix:
        return  # hidden, or of no kind
    if entry.isfile():
        member = Member(entry.name, entry.offset_data, entry.size)
    elif entry.islnk():  # a second name of a file before it
        of_link, kind = _sample_of(entry.linkname)
        if (linked := samples.get(of_link, {}).get(kind)) is None:
            raise tarfile.ReadError(
                f"{entry.name} is a link to {entry.linkname}, which is no file before it"
            )
        member = replace(linked, name=entry.name)
    elif entry.issym() and suffix in _OF_SAMPLES:
        raise tarfile.ReadError(f"{entry.name} is a symbolic link: pack it with tar --dereference")
    else:
        return
    if suffix in samples.setdefault(key, {}):
        raise tarfile.ReadError(f"{entry.name} comes twice")
    samples[key][suffix] = member


def _sample_of(name: str) -> tuple[str, str]:
    # The sample that a member belongs to, and its kind.
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def image_of(files: Mapping[str, Member]) -> Member | None:
    """The image among the files of a sample, None if it has none."""
    kinds = [suffix for suffix in files if suffix in IMAGE_KINDS]
    return files[min(kinds, key=lambda suffix: suffix not in _USUAL)] if kinds else None


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: damaged or incomplete pack ({reason}); reinstall mulki")
