"""The run folder of a report, and what a reader needs of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mulki.metrics import ZERO_SHOT
from mulki.results import RunFolder
from tests.report.report_helpers import SMALL, write_whole_run


@pytest.fixture(scope="session")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def whole(written_once: Path, tmp_path: Path) -> Path:
    """A whole run, which a test may damage."""
    return Path(shutil.copytree(written_once, tmp_path / "whole"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = RunFolder.create(
        tmp_path,
        "first",
        method="mulki",
        order="II",
        seed=4,
        columns=SMALL.columns,
        config={"prompt": "a photo of a <b>{}</b>"},
        hashes={"weights": "0123abcd", "splits": {"digits": "4567"}, "prompts": None},
    )
    for name, n in zip(SMALL.columns, (300, 400, 500), strict=True):
        run.record(after_task=ZERO_SHOT, eval_dataset=name, value=1.0, n=n, seconds=1.0, step=0)
    for after, row in [
        (ZERO_SHOT, SMALL.zero_shot or ()),
        *zip(SMALL.tasks, SMALL.rows, strict=True),
    ]:
        run.add_row(after, dict(zip(SMALL.columns, row, strict=True)))
    run.finish()
    return run.path
