"""The backend of blocks, forced, and blocks that cut small cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mulki.ops import use_backend
from mulki.ops.chunked import blocks
from tests.ops.chunked.watch import MIB

#: Bytes of blocks that cut rows, or rows and columns, of small cases.
CUT = (4096, 512)


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing else answers."""
    monkeypatch.setenv("MULKI_STRICT", "1")
    for name in ("MULKI_CHUNK_MB", "MULKI_COMPILE"):
        monkeypatch.delenv(name, raising=False)
    with use_backend("chunked"):
        yield


@pytest.fixture(params=CUT)
def cut_small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of very few rows, which casts are then, too."""
    size: int = request.param
    monkeypatch.setattr(blocks, "LEAST_ROWS", 4)
    monkeypatch.setenv("MULKI_CHUNK_MB", str(size / MIB))
    return size
