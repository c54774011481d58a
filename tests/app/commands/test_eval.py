from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mulki.app.cli import run_command
from mulki.app.commands.eval import _print_recalls
from mulki.runs.metrics import read_matrix
from mulki.runs.reading import read_folder

Refused = Callable[[Sequence[object]], str]


def test_a_run_is_evaluated_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        f"--{kind}={tmp_path / kind}.csv" for kind in ("predictions", "per_class", "confusion")
    ]
    assert run_command(["eval", str(finished), "--json", *files]) == 0
    found = json.loads(capsys.readouterr().out)
    matrix = read_matrix(finished / "matrix.csv")
    assert [of["task"] for of in found["tasks"]] == list(matrix.columns)
    assert tuple(round(of["own"]["acc1"], 4) for of in found["tasks"]) == matrix.rows[-1]
    assert found["label_space"] == "task"
    head = read_folder(finished).with_head
    assert head is not None
    of_head = found["with_head"]
    assert tuple(round(of["own"]["acc1"], 4) for of in of_head["tasks"]) == head.matrix.rows[-1]
    assert round(of_head["all"]["acc1"], 4) == head.class_incremental.last
    assert found["hashes"].keys() >= {"weights", "prompts", "splits"}
    # A line for each image and label space, and the header.
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * sum(of["images"] for of in found["tasks"])
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == 1 + 2 * 5
    images = [
        int(line.split(",")[-1])
        for line in (tmp_path / "confusion.csv").open()
        if "images" not in line
    ]
    assert sum(images) == len(lines) - 1


def test_a_table_for_people(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latest = finished / "checkpoints" / "latest"
    assert run_command(["eval", str(latest)]) == 0
    out = capsys.readouterr().out
    title = "among the classes of its task, "
    by_texts, with_head = out.split(f"{title}with head")
    assert by_texts.startswith(f"{title}by texts alone")
    assert max(map(len, out.splitlines())) <= 80
    head = read_folder(finished).with_head
    assert head is not None
    for text, matrix in (
        (by_texts, read_matrix(finished / "matrix.csv")),
        (with_head, head.matrix),
    ):
        own, union = text.split("among the classes of all tasks here")
        rows, of_all = (
            {line.split()[0]: line.split()[1:] for line in part.splitlines() if line.strip()}
            for part in (own, union)
        )
        for task, accuracy in zip(matrix.columns, matrix.rows[-1], strict=True):
            assert rows[task][1] == f"{accuracy:.2f}"
            assert float(of_all[task][1]) <= accuracy + 0.01
        mean = sum(matrix.rows[-1]) / len(matrix.columns)
        assert rows["mean"][0] == f"{mean:.2f}" and len(rows["mean"]) == 3
        assert of_all["all"][:2] == ["images", "25"]
    assert "matrix.csv of the run is in label space task" in out
    assert "weights" in out and "prompts" in out and "splits" in out


def test_no_number_is_cut_beside_a_long_name(
    finished: Path,
    task_folders: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = tmp_path / "-".join(["a-long-name-of-a-task"] * 3)
    shutil.copytree(task_folders[0], long)
    latest = finished / "checkpoints" / "latest"
    assert run_command(["eval", str(latest), "--tasks", str(long)]) == 0
    out = capsys.readouterr().out
    assert "\u2026" not in out and max(map(len, out.splitlines())) <= 80
    assert len(re.findall(r"\d+\.\d\d", out)) >= 12


@pytest.mark.parametrize("name", ["flags", "-".join(["a-long-name-of-a-task"] * 3)])
def test_no_recall_is_cut(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = [f"{kind}_retrieval_recall@{k}" for kind in ("image", "text") for k in (1, 5, 10)]
    _print_recalls({name: dict.fromkeys(metrics, (66.667, 5))})
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "\u2026" not in out
    assert out.count("66.67") == len(metrics)


def test_bad_input(refused: Refused, finished: Path, tmp_path: Path) -> None:
    assert "CHECKPOINT" in refused(["eval"])
    assert "none: no such file or folder" in refused(["eval", tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    assert "--tasks: got none" in refused(["eval", tmp_path / "empty"])
    assert "is a folder" in refused(["eval", finished, "--predictions", tmp_path])
    twice = ["--predictions", tmp_path / "p.csv", "--confusion", tmp_path / "p.csv"]
    assert "--predictions writes too" in refused(["eval", finished, *twice])
    assert "neither a sequence" in refused(["eval", finished, "--tasks", "no_such"])
    for name in ("--lr", "--shots", "--seed"):
        assert name in refused(["eval", finished, name, "1"])


def test_help_tells_no_default_where_the_run_has_a_say(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(["eval", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("(default: ") == 2  # of --workers and --device
    assert "are those of the run that the checkpoint lies in" in out
