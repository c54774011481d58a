"""Kernels in Triton's interpreter, on memory that shows what they should not have touched."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.kernels.triton_memory import Memory, all_memory

if os.environ.get("TRITON_INTERPRET") != "1":
    # test_interpreted.py runs this folder.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def memory() -> Iterator[Memory]:
    """What kernels allocate comes from here."""
    with all_memory() as made:
        yield made
