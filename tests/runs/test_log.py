from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mulki.runs.log import run_log


@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
def test_the_log_is_opened_once_and_closed(
    tmp_path: Path, request: pytest.FixtureRequest, level: int
) -> None:
    package, other = logging.getLogger("mulki"), logging.getLogger("other")
    request.addfinalizer(lambda old=package.level: package.setLevel(old))  # type: ignore[misc]
    package.setLevel(level)
    before = package.level, list(package.handlers)
    package.info("before")
    with run_log(tmp_path / "out.log"):
        package.info("during ü\n\x1b")
        package.debug("detail")
        other.warning("elsewhere")
    package.info("after")
    lines = (tmp_path / "out.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(r"INFO mulki: during ü\n\x1b")
    assert (package.level, package.handlers) == before
