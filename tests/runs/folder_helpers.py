"""Run folders with made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mulki.runs.folder import RunFolder
from mulki.runs.results import Evaluation, read_evaluations

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
    found = {changes.pop("metric", "acc1"): (value, changes.pop("n", 600))}
    arguments = {"eval_dataset": "digits", "found": found, "seconds": 1.5, "step": 5, **changes}
    run.record(after, **arguments)
    return read_evaluations(run.path / "results.jsonl")[-1]


def summary_of(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return summary
