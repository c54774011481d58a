"""Download published data sets, check them, and say what a person has to do about the others."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulki.data.image_files import ImageFiles, find_unreadable
from mulki.data.published import manifests, torchvision_sets
from mulki.data.published.collections import Collection
from mulki.data.published.entries import Archive, Entry, entry
from mulki.data.published.source import Source
from mulki.data.published.tasks import NotThere, without_package
from mulki.data.task import ImageSet, Task
from mulki.errors import InputError

# Downloads lie here until they are whole; a data set appears in its place in one step.
PARTIAL = ".preparing"

_ARCHIVES = (".gz", ".tar", ".tgz", ".zip")


@dataclass(frozen=True)
class State:
    """What is known of one data set after it was prepared.

    Attributes:
        name: of the data set.
        task: as it can be read; None if it cannot.
        problem: what to do about it, in words; empty if nothing.
    """

    name: str
    task: Task | None
    problem: str = ""


def prepare(
    collection: Collection,
    names: tuple[str, ...],
    source: Source,
    says: Callable[[str], None] = lambda words: None,
) -> Iterator[State]:
    """Download what is missing, check every image as far as that is cheap, and write manifests.

    What is there already is kept, so a run that was interrupted goes on where it stopped; whole
    archives are not downloaded again.

    Args:
        collection: of the data sets.
        names: of them, those to prepare.
        source: the data root, which is made if it does not exist, and a protocol.
        says: told what is being done.

    Returns:
        The state of each data set, when it is known.

    Raises:
        InputError: no data root, or one that cannot be made.
    """
    if source.root is not None:
        root = Path(source.root).expanduser()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--data-root: {root} cannot be made ({error.strerror}); name another folder"
            ) from None
    root = source.folder()
    for name in names:
        says(f"{name}: reading")
        try:
            try:
                yield _checked(collection, name, source, says)
            except NotThere as missing:
                if not (missing.helped_by_download and downloadable(entry(name))):
                    raise
                says(f"{name}: downloading")
                _download(entry(name), root)
                yield _checked(collection, name, source, says)
        except InputError as error:
            yield State(name, None, str(error))


def downloadable(facts: Entry) -> bool:
    """Whether its files can be had without a person."""
    return facts.name in torchvision_sets.DOWNLOADS or bool(facts.archives)


def _checked(
    collection: Collection, name: str, source: Source, says: Callable[[str], None]
) -> State:
    task = collection.task(name, source)
    says(f"{name}: checking {len(task.train) + len(task.test)} images")
    files = {id(found): found for each in (task.train, task.test) for found in _files(each)}
    bad = find_unreadable(list(files.values()), skip_bad_images=True)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        return State(
            name,
            task,
            f"{name}: unreadable: {next(iter(bad))}{more}; delete its folder and start the command "
            "again",
        )
    protocol = collection.source(source).protocol
    assert protocol is not None
    try:
        manifests.write(task, protocol, source.folder())
    except InputError as error:
        # Data that others prepared may lie where this user cannot write.
        says(f"{name}: no manifest: {error}")
    return State(name, task)


def _files(images: ImageSet) -> list[ImageFiles]:
    # None for arrays, which are not read from files one by one.
    while hasattr(images, "image_set"):
        images = images.image_set
    return [images] if isinstance(images, ImageFiles) else []


def _download(facts: Entry, root: Path) -> None:
    partial = root / PARTIAL / facts.name
    try:
        with _paths_checked():
            _fetch(facts, partial, root)
    except ModuleNotFoundError as error:
        raise without_package(facts.name, error) from None
    except Exception as error:  # urllib, ssl, tarfile, zipfile and torchvision have their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{facts.name}: the download failed ({reason}); check the network and start the "
            f"command again, which goes on from there, or get the files from {facts.home}"
        ) from None
    finally:
        _remove_empty(partial)


def _fetch(facts: Entry, folder: Path, root: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Files that were only half unpacked when a download was interrupted would go unnoticed.
    _remove_files(folder, archives=False)
    for archive in facts.archives:
        _unpack(archive, folder)
    if not facts.archives:
        torchvision_sets.dataset(torchvision_sets.DOWNLOADS[facts.name], folder, download=True)
    _remove_files(folder, archives=True)
    for made in sorted(folder.iterdir()):
        place = root / made.name
        if place.exists():
            # What is there was not complete, but may hold more than this data set.
            place.rename(_free(place.with_name(f"{place.name}.incomplete")))
        os.replace(made, place)


def _unpack(archive: Archive, folder: Path) -> None:
    from torchvision.datasets import utils

    utils.download_url(archive.url, str(folder), md5=archive.md5)
    path = folder / archive.url.rpartition("/")[2]
    if archive.sha256 is not None:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        if digest.hexdigest() != archive.sha256:
            path.unlink()
            raise ValueError(f"{path.name} has the SHA-256 {digest.hexdigest()[:12]}...")
    utils.extract_archive(str(path), str(folder))


@contextmanager
def _paths_checked() -> Iterator[None]:
    # torchvision unpacks by tarfile's default, which writes to any path before Python 3.14. Without
    # this filter Python is older than 3.10.12 or 3.11.4.
    opened: Any = tarfile.TarFile
    if not hasattr(tarfile, "data_filter"):
        yield
        return
    before = opened.extraction_filter
    opened.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        opened.extraction_filter = before


def _remove_empty(folder: Path) -> None:
    # The folder, those in it and that above it, as far as they hold nothing.
    inner = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in (*inner, folder, folder.parent):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _free(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000))]
    return next(each for each in names if not each.exists())


def _remove_files(folder: Path, *, archives: bool) -> None:
    for path in list(folder.rglob("*")):
        if path.is_file() and path.name.endswith(_ARCHIVES) is archives:
            path.unlink()
