"""What a test imports by ``--import`` and registers, undone after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mulki import methods
from mulki.data import sequences, transforms
from mulki.ops import gates
from mulki.train.config import imports

BUILT_IN = set(methods.available())


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a test imports and registers goes with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sequences, "_SEQUENCES", dict(sequences._SEQUENCES))
    monkeypatch.setattr(transforms, "_BUILDERS", dict(transforms._BUILDERS))
    monkeypatch.setattr(gates, "GATES", dict(gates.GATES))
    monkeypatch.setattr(imports, "_failures", {})
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    pending: list[type] = [methods.Method]
    while pending:
        method = pending.pop()
        pending += method.__subclasses__()
        # Methods are found as subclasses that have a name, as long as they live.
        if method.__module__ not in sys.modules and "name" in vars(method):
            del method.name  # type: ignore[attr-defined]
    assert set(methods.available()) == BUILT_IN
