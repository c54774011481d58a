"""Run folders with made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mulki.runs.folder import RunFolder
from mulki.runs.results import Evaluation

COLUMNS = ("letters", "digits", "flags")


def make(logs: Path, name: str | None = "first", **changes: Any) -> RunFolder:
    arguments: dict[str, Any] = {
        "method": "mulki",
        "order": "I",
        "seed": 3,
        "columns": COLUMNS,
        "config": {"lr": 1e-5},
        **changes,
    }
    return RunFolder.create(logs, name, **arguments)


def row(*values: float) -> dict[str, float]:
    return dict(zip(COLUMNS, values, strict=True))


def evaluate(run: RunFolder, after: str, value: float = 50.0, **changes: Any) -> Evaluation:
    arguments: dict[str, Any] = {
        "after_task": after,
        "eval_dataset": "digits",
        "value": value,
        "n": 600,
        "seconds": 1.5,
        "step": 5,
        **changes,
    }
    return run.record(**arguments)


def summary_of(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return summary
