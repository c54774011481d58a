"""A finished run of the tiny model, for commands that read one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mulki.app.cli import run_command
from mulki.train import sequence
from mulki.train.config.run_config import resolve
from tests.report.report_helpers import empty_figures
from tests.train.run_helpers import SHORT
from tests.train_helpers import load_tiny, start_model, task_folders, tiny_models, without_figures

__all__ = ["empty_figures", "load_tiny", "start_model", "task_folders", "tiny_models"]


@pytest.fixture(scope="session")
def finished(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a run on colours and shades that nothing may change."""
    logs = tmp_path_factory.mktemp("logs")
    given = {"tasks": task_folders, "logs": str(logs), "name": "first", "method": "finetune"}
    with without_figures():
        folder = sequence.run(resolve({**SHORT, **start_model, **given}))
    assert folder is not None
    return folder.path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[object]], str]:
    """The one line that a command with bad input prints."""

    def go(words: Sequence[object]) -> str:
        capsys.readouterr()
        status = run_command([str(word) for word in words])
        out, error = capsys.readouterr()
        assert (status, out, error.count("\n")) == (2, "", 1), (status, out, error)
        return error

    return go
