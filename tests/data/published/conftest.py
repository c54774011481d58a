"""A data root with every published data set, tiny, written once; and their counts made to fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from mulki.data.published import Entry, Source, entries, tasks
from tests.data.published import layouts

Fit = Callable[..., None]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for write in layouts.WRITERS.values():
        write(root)
    return root


@pytest.fixture
def data_root(written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root, with torchvision's checksums and the published numbers of images set aside."""
    layouts.accept(written, monkeypatch)
    any_number(monkeypatch)
    return written


@pytest.fixture
def zscl(data_root: Path) -> Source:
    return Source(data_root, "zscl")


def any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any number of images for the published one."""
    real = entries.entry

    def without_counts(name: str) -> Entry:
        facts = real(name)
        protocols = {
            key: dataclasses.replace(each, train=None, test=None)  # type: ignore[arg-type]
            for key, each in facts.protocols.items()
        }
        return dataclasses.replace(facts, protocols=protocols)

    monkeypatch.setattr(tasks, "entry", without_counts)
