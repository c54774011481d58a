"""Short runs of tiny models, and what they leave in their folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mulki import methods
from mulki.runs.answers import read_answers
from mulki.runs.folder import RunFolder
from mulki.runs.results import read_evaluations
from mulki.train import sequence
from mulki.train.config.run_config import read_config, resolve
from mulki.train.display.progress import RunProgress

Run = Callable[..., RunFolder]


SHORT = {
    "iterations": 4,
    "batch_size": 6,
    "lr": 1e-3,
    "precision": "fp32",
    "device": "cpu",
    "log_every_n_steps": 2,
}


def options_of(method: str) -> dict[str, Any]:
    """What a run of the method has to name, for its default options."""
    cls = methods.get(method)
    needs = cls(cls.Options()).needs
    named: dict[str, Any] = {"reference": "current"} if needs.reference else {}
    return named | ({"lora_rank": 2} if needs.directions else {})


def weights(folder: RunFolder | Path, pattern: str = "task_02*") -> dict[str, torch.Tensor]:
    path = folder.path if isinstance(folder, RunFolder) else folder
    (file,) = (path / "checkpoints").glob(f"{pattern}.safetensors")
    return load_file(file)


def resumed(folder: Path, console: Console | None = None) -> RunFolder:
    done = sequence.run(resolve(read_config(folder / "args.yaml")), console, resume=folder)
    assert done is not None
    return done


def results_of(folder: Path) -> Any:
    lines = [
        (e.step, e.after_task, e.eval_dataset, e.metric, e.value, e.n)
        for e in read_evaluations(folder / "results.jsonl")
    ]
    answers = {
        (row, name): [a.own.tolist() for a in (each, each.head) if a is not None]
        for row, by_name in read_answers(folder).items()
        for name, each in by_name.items()
    }
    summary = json.loads((folder / "summary.json").read_text())
    del summary["seconds"], summary["name"]
    return lines, answers, summary, (folder / "matrix.csv").read_text()


def checkpoint_hashes(folder: RunFolder | Path) -> dict[str, str]:
    """The SHA-256 of every file below `checkpoints/`."""
    root = (folder.path if isinstance(folder, RunFolder) else folder) / "checkpoints"
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in root.rglob("*")
        if file.is_file()
    }


def unequal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """By how much weights differ, by the names of those that do."""
    assert one.keys() == other.keys()
    by_how_much = {name: float((value - other[name]).abs().max()) for name, value in one.items()}
    return {name: most for name, most in by_how_much.items() if most != 0}


def check_same(one: Path, other: Path) -> None:
    assert results_of(one) == results_of(other)
    for task in ("task_01*", "task_02*"):
        assert unequal(weights(one, task), weights(other, task)) == {}
    assert checkpoint_hashes(one) == checkpoint_hashes(other)
    assert not (one / "recovery").exists() and not list(one.rglob("*.tmp"))


def stop_at(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Raise an error after so many steps of a run."""
    real, seen = RunProgress.step, []

    def step(self: RunProgress, report: Any) -> None:
        real(self, report)
        seen.append(report)
        if len(seen) == number:
            raise error

    patch.setattr(RunProgress, "step", step)
