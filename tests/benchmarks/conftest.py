"""What the benchmarks' programs set for their process, undone after each test."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    package = logging.getLogger("mulki")
    level = package.level
    yield
    package.setLevel(level)
