from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from mulki.errors import InputError
from mulki.runs.predictions import (
    Predictions,
    TaskPredictions,
    check_writable,
    figures,
    write_classes,
    write_confusion,
    write_predictions,
)

SIX = [("a", name) for name in ("zero", "one", "two", "three", "four", "five")]


def made(target: list[int], ranked: list[list[int]]) -> Predictions:
    chance = np.linspace(0.5, 0.9, len(target), dtype=np.float32)
    return Predictions(SIX, np.array(target), np.array(ranked), chance)


@pytest.fixture
def found() -> Predictions:
    # Two of three are right; the third is among the likeliest five, the fourth is not.
    return made([0, 0, 1, 5], [[0, 1, 2, 3, 4], [0, 2, 1, 3, 4], [2, 3, 1, 0, 5], [0, 1, 2, 3, 4]])


def test_figures(found: Predictions) -> None:
    assert figures([found]) == {
        "acc1": 50.0,
        "acc5": 75.0,
        "mean_per_class_recall": pytest.approx(100 / 3),
    }
    assert found.of_classes() == {0: (2, 2), 1: (0, 1), 5: (0, 1)}
    assert found.confusion() == {(0, 0): 2, (1, 2): 1, (5, 0): 1}


def test_figures_over_several_sets_count_images(found: Predictions) -> None:
    other = made([1, 1], [[1, 0, 2, 3, 4], [1, 0, 2, 3, 4]])
    both = figures([found, other])
    assert both["acc1"] == pytest.approx(100 * 4 / 6)
    # Class 1 has two of three images right, over both.
    assert both["mean_per_class_recall"] == pytest.approx((100 + 200 / 3 + 0) / 3)


def test_among_five_classes_all_are_among_the_likeliest_five() -> None:
    few = Predictions(SIX[:5], np.array([0]), np.array([[1, 0, 2, 3, 4]]), np.ones(1, np.float32))
    assert few.in_top is None
    assert figures([few])["acc5"] is None


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_files(found: Predictions, tmp_path: Path) -> None:
    names = ["0.png", "1.png", 'x,"2".png', "3\r.png"]
    of = [TaskPredictions("a", names, found, found)]
    write_predictions(tmp_path / "p.csv", of)
    rows = table(tmp_path / "p.csv")
    assert len(rows) == 8 and {row["among"] for row in rows} == {"task", "all"}
    assert rows[2] == {
        "task": "a",
        "image": 'x,"2".png',
        "class": "one",
        "among": "task",
        "predicted": "two",
        "predicted_task": "a",
        "probability": "0.7667",
        "top2": "three",
        "top3": "one",
        "top4": "zero",
        "top5": "five",
    }
    assert rows[3]["image"] == "3\\r.png"  # readers would take it for the end of the line
    right = [row["predicted"] == row["class"] for row in rows[:4]]
    assert 100 * sum(right) / 4 == figures([found])["acc1"]

    write_classes(tmp_path / "c.csv", of)
    first = table(tmp_path / "c.csv")[0]
    assert (first["class"], first["images"], first["right"], first["accuracy"]) == (
        "zero",
        "2",
        "2",
        "100.0000",
    )
    write_confusion(tmp_path / "x.csv", of)
    cells = [(r["class"], r["predicted"], r["images"]) for r in table(tmp_path / "x.csv")[:3]]
    assert cells == [("zero", "zero", "2"), ("one", "two", "1"), ("five", "zero", "1")]


def test_where_nothing_can_be_written_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="^--predictions: got "):
        check_writable("--predictions", tmp_path)
    with pytest.raises(InputError, match="^--predictions: .*none"):
        check_writable("--predictions", tmp_path / "none" / "p.csv")
    check_writable("--predictions", tmp_path / "p.csv")
    assert not list(tmp_path.iterdir())
    for device in (Path(os.devnull), Path("/dev/stdout")):
        with pytest.raises(InputError, match="no ordinary file"):
            check_writable("--predictions", device)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path or mode != os.W_OK)
    with pytest.raises(InputError, match="nothing can be written"):
        check_writable("--predictions", tmp_path / "p.csv")
