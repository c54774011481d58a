"""The benchmark of the relation to text anchors, on small shapes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.step import anchors


def test_every_shape_has_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "anchors.csv"
    anchors.main(
        ["--images", "8", "--anchors", "20", "30", "--width", "16"]
        + ["--seconds", "0", "--output", str(path)]
    )
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["texts_of"], r["anchors"], r["loop"]) for r in rows] == [
        (texts, count, way)
        for texts in ("teacher", "student")
        for count in ("20", "30")
        for way in ("fused", "plain")
    ]
    assert all(float(row["ms"]) > 0 for row in rows)
    assert {float(row["speedup"]) for row in rows if row["loop"] == "plain"} == {1.0}
    assert "| teacher | 8 | 20 | 16 | fused |" in capsys.readouterr().out


def test_ways_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "TEMPERATURE", 3.0)  # what only the plain way reads
    with pytest.raises(AssertionError, match="not close"):
        anchors.measure("teacher", 8, 20, 16, 0.0, "cpu")
