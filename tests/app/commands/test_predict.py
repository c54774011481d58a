from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest

from mulki.app.cli import run_command
from mulki.train.model import load

Refused = Callable[[Sequence[object]], str]


@pytest.fixture
def photos(task_folders: tuple[str, str]) -> Path:
    return Path(task_folders[1]) / "test" / "dark"


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_line_for_each_image(
    finished: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    wanted = load(finished, precision_eval=precision).predict(photos, top=2)
    loaded = Mock(side_effect=load)
    monkeypatch.setattr("mulki.train.model.load", loaded)
    given = ["--top", "2", "--precision-eval", precision]
    assert run_command(["predict", str(finished), str(photos), *given]) == 0
    assert loaded.call_args.kwargs["precision_eval"] == precision
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(wanted) == 5
    for line, each in zip(lines, wanted, strict=True):
        first, second = each.classes
        assert line.startswith(
            f"{each.image}: {first} {100 * each.probabilities[0]:.1f} %, {second}"
        )


def test_a_file_of_classes_and_one_of_predictions(
    finished: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("dark\n\ncat\n")
    out = tmp_path / "out.csv"
    words = ["predict", str(finished / "checkpoints" / "latest"), str(photos), "--top", "3"]
    words += ["--classes", str(tmp_path / "names.txt"), "--csv", str(out), "--threshold", "1"]
    assert run_command(words) == 0
    assert capsys.readouterr().out == f"{out}: 5 images\n"
    header, *rows = csv.reader(out.open(encoding="utf-8"))
    assert header[:4] == ["image", "label", "class_1", "probability_1"] and len(header) == 8
    for row in rows:
        assert row[1] == "" and {row[2], row[4]} == {"dark", "cat"} and row[6:] == ["", ""]
        assert float(row[3]) + float(row[5]) == pytest.approx(1, abs=2e-4)


def test_paths_from_standard_input_and_unreadable_images(
    finished: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    given = f"{tmp_path / 'bad.png'}\n{photos / '0.png'}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    # A head may be sure, where texts alone are not.
    words = ["predict", str(finished), "-", "--threshold", "1", "--no-head"]
    assert run_command(words) == 1
    out, error = capsys.readouterr()
    assert out.startswith(f"{photos / '0.png'}: - (") and out.count("\n") == 1
    assert f"mulki: {tmp_path / 'bad.png'}: unreadable image" in error
    assert error.endswith("mulki: 1 image left out\n")


def test_names_that_are_no_utf8(
    finished: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(name)).write_bytes((photos / "0.png").read_bytes())
    except (OSError, UnicodeError):
        pytest.skip("the file system takes UTF-8 alone")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(name + b"\n"), "utf-8"))
    out = tmp_path / "out.csv"
    assert run_command(["predict", str(finished), "-", "--csv", str(out)]) == 0
    _, (image, *_) = csv.reader(out.open(encoding="utf-8"))
    assert image == f"{tmp_path}/caf\\udce9.png"


def test_bad_input(
    refused: Refused, finished: Path, photos: Path, tmp_path: Path, start_model: dict[str, str]
) -> None:
    (tmp_path / "none.txt").write_text("\n")
    start = start_model["model"]
    for words, said in (
        ([finished], "IMAGE"),
        ([finished, tmp_path / "gone"], "gone: no such file or folder"),
        ([finished, photos, "--top", "0"], "--top: got '0', wanted a whole number from 1"),
        ([finished, photos, "--threshold", "2"], "--threshold: got '2', wanted a number from 0"),
        ([finished, photos, "--threshold", "x"], "--threshold: got 'x'"),
        ([finished, photos, "--csv", tmp_path], "--csv: got"),
        ([finished, photos, "--classes", tmp_path / "gone"], "cannot be read"),
        ([finished, photos, "--classes", tmp_path / "none.txt"], "holds no name"),
        (
            [finished, photos, "--no-head", "--classes", tmp_path / "gone"],
            "--no-head: with --class",
        ),
        ([start, photos], "--classes FILE with a name in each line"),
    ):
        assert said in refused(["predict", *words])
