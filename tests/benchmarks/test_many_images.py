"""The start of a task of many images: what is measured, and that nothing is left."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest

from benchmarks.step import many_images
from mulki.data.image_files import ImageFiles
from mulki.train.display import progress


def test_all_images_are_checked_and_the_bar_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Checks that take a second or two in all, for which the bar is drawn from the first one on.
    real = ImageFiles.verify
    monkeypatch.setattr(ImageFiles, "verify", lambda *of: (time.sleep(0.02), real(*of))[1])
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    (tmp_path / "place").mkdir()
    given = ["--images", "400", "--folder", str(tmp_path / "place")]
    many_images.main([*given, "--output", str(tmp_path / "out.csv")])
    assert list((tmp_path / "place").iterdir()) == []
    with (tmp_path / "out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["images"] == "400" and 900 < int(row["bytes"]) < 1200
    assert int(row["positions"]) >= 2
    assert 0 < float(row["listing"]) < float(row["start"])
    assert 0 < float(row["longest"]) < float(row["start"])
    assert "| 400 | " in capsys.readouterr().out


def test_images_that_are_not_found_are_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = many_images.write_images

    def one_more(root: Path, count: int) -> int:
        return real(root, count + 1)

    monkeypatch.setattr(many_images, "write_images", one_more)
    with pytest.raises(RuntimeError, match="300 .* 301 .* 301 "):
        many_images.measure(300, tmp_path)
