"""Tiny models and tasks, and runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mulki.data import Task, folder_task
from mulki.engine import sequence
from mulki.engine.config import resolve
from mulki.results import RunFolder
from tests.engine.run_helpers import SHORT, Run
from tests.engine_helpers import (
    load_tiny,
    start_model,
    task_folders,
    tiny_models,
)

__all__ = ["load_tiny", "start_model", "task_folders", "tiny_models"]


@pytest.fixture
def run(tmp_path: Path, start_model: dict[str, str], task_folders: tuple[str, str]) -> Run:
    def go(name: str = "first", console: Console | None = None, **options: Any) -> RunFolder:
        given = {"tasks": task_folders, "logs": str(tmp_path / "logs"), "name": name}
        merged = {**SHORT, **start_model, **given, **options}
        if "epochs" in options:
            del merged["iterations"]
        settings = resolve(merged)
        return sequence.run(settings, console)

    return go


@pytest.fixture
def task(task_folders: tuple[str, str]) -> Task:
    return folder_task(task_folders[0])
