"""A published data set as a task: read, compared with what is published, named."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mulki.data.class_order import reordered
from mulki.data.published import coop, folder_sets, manifests, torchvision_sets
from mulki.data.published.blank import blank_task
from mulki.data.published.entries import Entry, Protocol, entry
from mulki.data.published.found import Found
from mulki.data.published.source import Source
from mulki.data.task import Task
from mulki.errors import InputError

_READERS: dict[str, Callable[[Path], Found]] = torchvision_sets.READERS | folder_sets.READERS


class NotThere(InputError):
    """The files of a data set are missing, or not those that are published.

    Attributes:
        helped_by_download: whether downloading the data set would help; it would not where a person
            has to bring a file.
    """

    def __init__(self, message: str, helped_by_download: bool = True):
        super().__init__(message)
        self.helped_by_download = helped_by_download


def published_task(name: str, source: Source, templates: Sequence[str] | None = None) -> Task:
    """Read one data set as a task.

    Under the protocol `cil` classes are in the published order of class-incremental work, if there
    is one.

    Args:
        name: of the data set.
        source: where it lies, a protocol that it has (`zscl` by default), and whether blank images
            stand in for it where it is not there and its number of training images is published.
        templates: used instead of those of the protocol.

    Raises:
        NotThere: its files are missing, incomplete, of another version, or differ from a manifest.
        InputError: no such data set or protocol, or no data root.
    """
    facts = entry(name)
    chosen = source.protocol or "zscl"
    protocol = facts.protocol(chosen)
    root = source.folder()
    try:
        task = _task(facts, chosen, root, templates)
    except NotThere:
        if source.absent is None or protocol.train is None:
            raise
        source.absent(facts)
        return blank_task(name, facts.classes, templates or protocol.templates, protocol)
    if differs := manifests.difference(task, chosen, root):
        raise NotThere(f"{name}: {differs}", helped_by_download=False)
    return reordered(task, facts.class_order) if chosen == "cil" and facts.class_order else task


def _task(facts: Entry, chosen: str, root: Path, templates: Sequence[str] | None) -> Task:
    protocol = facts.protocol(chosen)
    found = _read(facts, chosen, root)
    classes = _classes(facts, protocol, found, chosen)
    for split, images, published in (
        ("training", found.train, protocol.train),
        ("test", found.test, protocol.test),
    ):
        if published is not None and len(images) != published:
            raise _not_there(
                facts, root, f"it has {len(images)} {split} images, {published} are published"
            )
    chosen_templates = tuple(templates or protocol.templates)
    return Task(facts.name, classes, chosen_templates, found.train, found.test)


def _read(facts: Entry, protocol: str, root: Path) -> Found:
    if protocol == "coop" and facts.protocols["coop"].split:
        try:
            return coop.read_split(facts, root)
        except InputError as error:
            raise NotThere(str(error), isinstance(error, coop.NoImages)) from None
    try:
        return _READERS[facts.name](root)
    except ModuleNotFoundError as error:
        raise without_package(facts.name, error) from None
    except MemoryError:
        raise
    except Exception as error:  # torchvision's readers raise whatever they meet
        said = " ".join(str(error).split())
        reason = said.replace(" You can use download=True to download it", "").rstrip(".")
        raise _not_there(facts, root, reason or type(error).__name__) from None


def without_package(name: str, error: ModuleNotFoundError) -> InputError:
    """Of a data set for which a package is needed that is not here."""
    package = error.name or str(error)
    return InputError(f"{name}: needs {package}, which is not installed; pip install {package}")


def _not_there(facts: Entry, root: Path, reason: str) -> NotThere:
    what = f"{facts.name}: cannot be read from {root} ({reason})"
    if facts.manual:
        return NotThere(f"{what}; {facts.manual}")
    collection = "mtil" if "zscl" in facts.protocols else "cil"
    return NotThere(
        f"{what}; mulki tasks {collection}:{facts.name} --prepare --data-root {root} downloads it"
    )


def _classes(facts: Entry, protocol: Protocol, found: Found, chosen: str) -> tuple[str, ...]:
    names = found.classes
    if names is None:
        return facts.classes
    if len(names) != protocol.num_classes:
        raise NotThere(
            f"{facts.name}: its files have {len(names)} classes, {protocol.num_classes} are "
            "published; they are of another version or incomplete"
        )
    # CoOp's splits bring names of their own, and some files are the only source of them.
    if (chosen == "coop" and protocol.split) or not facts.classes:
        return tuple(name.replace("_", " ").strip() for name in names)
    # The files say which index a class has, the registry how its name is written.
    by_key = {_key(name): name for name in facts.classes}
    for name in names:
        if _key(name) not in by_key:
            raise NotThere(
                f'{facts.name}: its files have a class "{name}", which the published data set has '
                "not; they are of another version"
            )
    return tuple(by_key[_key(name)] for name in names)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.casefold())
