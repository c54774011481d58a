"""The benchmark of the loss part of a step, on small shapes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.step import objective, plain


def test_every_shape_has_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "objective.csv"
    objective.main(
        ["--images", "8", "--classes", "4", "6", "--width", "16"]
        + ["--seconds", "0", "--output", str(path)]
    )
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["classes"], r["loop"]) for r in rows] == [
        (classes, way) for classes in ("4", "6") for way in ("fused", "plain")
    ]
    assert all(float(row["ms"]) > 0 for row in rows)
    assert {float(row["speedup"]) for row in rows if row["loop"] == "plain"} == {1.0}
    assert "| 8 | 4 | 16 | fused |" in capsys.readouterr().out


def test_ways_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> object:
        return 1.1 * objective_of_plain(*args)

    objective_of_plain = plain.objective
    monkeypatch.setattr(plain, "objective", wrong)
    with pytest.raises(AssertionError, match="not close"):
        objective.measure(8, 4, 16, 0.0, "cpu")
