"""Tiny models and tasks, and runs of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mulki.data import Task, folder_task
from mulki.runs.folder import RunFolder
from mulki.train import sequence
from mulki.train.config.run_config import resolve
from tests.train.crafted_method import Crafted
from tests.train.reference_method import OnReference
from tests.train.run_helpers import SHORT, Run, stop_at
from tests.train_helpers import (
    COLOURS,
    load_tiny,
    start_model,
    task_folders,
    tiny_models,
    without_figures,
    write_task,
)

__all__ = ["load_tiny", "start_model", "task_folders", "tiny_models"]


@pytest.fixture(autouse=True)
def no_figures() -> Iterator[None]:
    with without_figures():
        yield


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


@pytest.fixture(scope="module")
def base(
    start_model: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Options of the runs on several processes, which `distributed_runs.py` compares."""
    root = tmp_path_factory.mktemp("distributed")
    shades = {"dark": (30, 30, 30), "light": (225, 225, 225)}
    tasks = write_task(root / "colours", COLOURS), write_task(root / "shades", shades, train=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnReference, "name", "on_reference", raising=False)
        patch.setattr(Crafted, "name", "crafted", raising=False)
        yield {
            "tasks": [str(task) for task in tasks],
            "logs": str(root),
            "precision": "fp32",
            "iterations": 4,
            "lr": 1e-3,
            "eps": 1e-4,
            "device": "cpu",
            "batch_size_eval": 4,
            **start_model,
        }


@pytest.fixture(scope="module")
def stopped_once(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    logs = tmp_path_factory.mktemp("stopped")
    given = {"tasks": task_folders, "logs": str(logs), "name": "first", "method": "finetune"}
    with pytest.MonkeyPatch.context() as patch, without_figures(), pytest.raises(RuntimeError):
        stop_at(patch, 5, RuntimeError("stop"))
        sequence.run(resolve({**SHORT, **start_model, **given}))
    return logs / "first"


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of one run that was stopped in its second task."""
    return Path(shutil.copytree(stopped_once, tmp_path / "first"))
