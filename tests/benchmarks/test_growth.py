"""The start of a task as its images grow in number: what is measured, and that nothing is left."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.step import growth


@pytest.mark.slow
def test_both_kinds_are_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "COUNTS", {growth.FILES: (500, 900), growth.MEMBERS: (800, 3000)})
    monkeypatch.setattr(
        growth, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count)
    )
    (tmp_path / "place").mkdir()
    given = ["--most", "1000", "--folder", str(tmp_path / "place")]
    growth.main([*given, "--output", str(tmp_path / "out.csv")])
    assert list((tmp_path / "place").iterdir()) == []
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [(growth.FILES, "500"), (growth.FILES, "900"), (growth.MEMBERS, "800")]
    assert [(row["of"], row["count"]) for row in rows] == wanted
    assert all(float(row["cpu_each"]) > 0 for row in rows)
    assert "| members of a shard | 800 | 1 | " in capsys.readouterr().out


def test_images_that_are_not_found_are_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = growth.write_shard
    monkeypatch.setattr(growth, "write_shard", lambda root, count: real(root, count + 2))
    with pytest.raises(RuntimeError, match="^800 members of a shard .* 401 images found"):
        growth.measure(growth.MEMBERS, 800, tmp_path)
