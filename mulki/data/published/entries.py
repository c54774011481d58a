"""The facts about each published data set, from the files in `sets/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from mulki.errors import InputError, nearest

PROTOCOLS = ("zscl", "coop", "cil")


@dataclass(frozen=True)
class Protocol:
    """How a data set is split and prompted.

    Attributes:
        train, test: numbers of images as published; None where none is.
        templates: prompts; the first one is trained with, evaluation averages over all.
        num_classes: C under this protocol.
        split: a file of names and labels that the user has beside the images, such as CoOp's.
        images: folders under the data root that the names in it may be relative to.
    """

    train: int | None
    test: int
    templates: tuple[str, ...]
    num_classes: int
    split: str | None = None
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Archive:
    """A file that torchvision has no downloader for, or none that knows its checksum.

    Attributes:
        md5: hex digest of the file.
        sha256: hex digest of it; None where nobody has published it.
    """

    url: str
    md5: str
    sha256: str | None = None


@dataclass(frozen=True)
class Size:
    """How much there is to download.

    Attributes:
        bytes: of all archives together.
        source: who says so.
    """

    bytes: int
    source: str


@dataclass(frozen=True)
class Entry:
    """A published data set.

    Attributes:
        name: as users write it.
        title, home, licence: for people; the licence in words.
        names: where the class names are from.
        num_classes: C.
        protocols: by name, of `PROTOCOLS`.
        classes: by index, [C]; empty where the files on disk alone have them.
        class_order: indices in the order in which class-incremental work learns them; empty
            without a published one.
        manual: what a person has to do where nothing can be downloaded; empty otherwise.
        archives: to download, where torchvision does not do it as well.
        download: the size of what torchvision, or a person, has to download; None if not known.
    """

    name: str
    title: str
    home: str
    licence: str
    names: str
    num_classes: int
    protocols: Mapping[str, Protocol]
    classes: tuple[str, ...] = ()
    class_order: tuple[int, ...] = ()
    manual: str = ""
    archives: tuple[Archive, ...] = ()
    download: Size | None = None

    def protocol(self, name: str) -> Protocol:
        """Its facts under a protocol.

        Raises:
            InputError: it has no such protocol.
        """
        if name not in self.protocols:
            raise InputError(
                f"--protocol {name}: {self.name} has no split of that name"
                f"{nearest(name, self.protocols)}; it has {', '.join(self.protocols)}"
            )
        return self.protocols[name]


@cache
def entry_names() -> tuple[str, ...]:
    """Names of all published data sets, sorted."""
    folder = files(__package__) / "sets"
    return tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml")))


@cache
def entry(name: str) -> Entry:
    """The facts about one data set.

    Raises:
        InputError: no such data set.
    """
    if name not in entry_names():
        raise InputError(
            f"{name}: no such published data set{nearest(name, entry_names())}; "
            f"there are {', '.join(entry_names())}"
        )
    text = (files(__package__) / "sets" / f"{name}.yaml").read_text(encoding="utf-8")
    facts: dict[str, Any] = yaml.safe_load(text)
    count = facts["num_classes"]
    facts["protocols"] = {
        key: Protocol(
            train=of.get("train"),
            test=of["test"],
            templates=tuple(of["templates"]),
            num_classes=of.get("classes", count),
            split=of.get("split"),
            images=tuple(of.get("images", ())),
        )
        for key, of in facts["protocols"].items()
    }
    facts["classes"] = tuple(facts.get("classes", ()))
    facts["class_order"] = _order(facts.get("class_order", ()), count)
    facts["archives"] = tuple(Archive(**each) for each in facts.get("archives", ()))
    facts["download"] = Size(**facts["download"]) if "download" in facts else None
    return Entry(name=name, **facts)


def _order(given: Any, count: int) -> tuple[int, ...]:
    if isinstance(given, Mapping):
        # The permutation of NumPy's generator of that seed, as PyCIL and ZSCL draw it.
        given = np.random.RandomState(given["seed"]).permutation(count).tolist()
    return tuple(given)
