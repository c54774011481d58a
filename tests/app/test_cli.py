from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mulki import __version__
from mulki.app.cli import run_command
from mulki.data.sequences import load_sequence
from mulki.errors import InputError
from mulki.report.tables import definition_lines
from mulki.runs.metrics import read_matrix
from tests import cli_helpers, train_helpers
from tests.cli_helpers import one_line
from tests.train_helpers import COLOURS, SHADES, write_split, write_task

command = cli_helpers.command
task = cli_helpers.task
tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model
task_folders = train_helpers.task_folders
MATRIX = "after_task,a,b\nzero-shot,10,20\na,80,18\nb,70,90\n"


# --- runs


def test_run_of_own_folders(
    command: Callable[..., int], task_folders: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--method mulki --seed 0 --iterations 2 --logs logs --name first".split()
    assert command("--tasks", *task_folders, *given) == 0
    out = capsys.readouterr().out
    assert "colours" in out and "shades" in out and "Transfer" in out
    assert re.search(r"class-incremental .*: average [\d.]+, last [\d.]+\n", out)
    assert str(Path("logs") / "first") in out
    assert read_matrix("logs/first/matrix.csv").tasks == ("colours", "shades")
    assert json.loads(Path("logs/first/summary.json").read_text())["status"] == "complete"


# --- bad input


def test_names_are_shown_as_they_are(
    command: Callable[..., int],
    task: Path,
    start_model: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not as the marks and the emoji codes of what draws the tables."""
    name = "[red]birds"
    shutil.move(task, name)
    place = ["--logs", "[b]runs[/a]", "--name", "of:cat:"]
    assert command(name, "--iterations", "1", *place) == 0
    out = capsys.readouterr().out
    assert name in out and out.splitlines()[-4:] == [
        "run folder: [b]runs[/a]/of:cat:",
        "open:       [b]runs[/a]/of:cat:/report.html",
        "predict:    mulki predict '[b]runs[/a]/of:cat:' IMAGES",
        "go on:      mulki run NEW_TASKS --continue '[b]runs[/a]/of:cat:'",
    ]
    model = ["--model", start_model["model"], "--device", "cpu"]
    for words in (["tasks"], ["plan", "--iterations", "1", *model]):
        assert run_command([words[0], name, *words[1:]]) == 0
        assert name in " ".join(capsys.readouterr().out.split()), words


def without_a_class(task: Path) -> str:
    for image in (task / "train" / "red").iterdir():
        image.unlink()
    return str(Path("mine") / "train" / "red")


def with_another_class(task: Path) -> str:
    (task / "test" / "red").rename(task / "test" / "pink")
    return "only in train: red; only in test: pink"


def without_test(task: Path) -> str:
    shutil.rmtree(task / "test")
    return "no test/"


def with_a_damaged_image(task: Path) -> str:
    (task / "test" / "blue" / "1.png").write_bytes(b"no image")
    return str(Path("mine") / "test" / "blue" / "1.png")


def as_a_file(task: Path) -> str:
    shutil.rmtree(task)
    task.write_text("a file")
    return "mine: a file"


@pytest.mark.parametrize(
    "damage",
    [without_a_class, with_another_class, without_test, with_a_damaged_image, as_a_file],
)
def test_bad_task_folders(
    command: Callable[..., int],
    task: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], str],
) -> None:
    said = damage(task)
    assert command("--tasks", "mine") == 2
    assert said in one_line(capsys)
    assert not Path("logs").exists()


def test_taken_run_folder(
    command: Callable[..., int],
    task: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("logs/first").mkdir(parents=True)
    Path("logs/first/matrix.csv").write_text("mine")
    monkeypatch.setattr("mulki.clip.models.load", lambda *a, **k: pytest.fail("loaded"))
    assert command("mine", "--name", "first") == 2
    line = one_line(capsys)
    assert str(Path("logs") / "first") in line and "--name" in line
    assert [p.name for p in Path("logs/first").iterdir()] == ["matrix.csv"]


def test_loss_that_is_not_finite(
    command: Callable[..., int], task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("mine", "--lr", "1e30", "--name", "first") == 2
    assert "--lr 1e+30" in one_line(capsys)
    assert json.loads(Path("logs/first/summary.json").read_text())["status"] == "interrupted"
    assert read_matrix(Path("logs/first/matrix.csv")).zero_shot is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], ["rnu", '"run"']),
        (["--hepl"], ["--hepl", "mulki --help"]),
        (["metrics"], ["MATRIX"]),
        (["metrics", "gone.csv"], ["gone.csv"]),
        (["metrics", "a.csv", "b.csv"], ["b.csv"]),
        (["compare"], ["RUN"]),
        (["compare", "gone"], ["gone", "not the folder of a run"]),
        (["report"], ["RUN"]),
        (["report", "gone"], ["gone", "no such folder"]),
        (["tasks", "gone"], ["gone"]),
        (["tasks", "--jsn"], ["--jsn"]),
    ],
)
def test_bad_commands(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    assert run_command(arguments) == 2
    line = one_line(capsys)
    assert all(part in line for part in said), line


def test_a_full_disk_is_one_line(
    command: Callable[..., int],
    task: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every file-system call fails from the first save within a task on, as on a full disk."""
    from mulki.train.saving import recovery

    def full(*given: object, **rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(given[0]))

    def fill_up(path: Path, state: dict[str, object]) -> None:
        monkeypatch.setattr(os, "open", full)
        monkeypatch.setattr(os, "fsync", full)
        monkeypatch.setattr(Path, "write_text", full)
        full(path)

    monkeypatch.setattr(recovery, "write_state", fill_up)
    assert command("mine", "--iterations", "3", "--save-every", "2", "--name", "first") == 1
    monkeypatch.undo()
    place = Path("logs") / "first" / "recovery"
    assert one_line(capsys).startswith(f"mulki: error: {place}")
    assert read_matrix(task.parent / "logs" / "first" / "matrix.csv").zero_shot is not None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "9 bytes"),
    ],
)
def test_no_memory_is_one_line(
    command: Callable[..., int],
    task: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    """There is none for the save, and none for the save at the end either."""
    from mulki.train.saving import recovery

    def fails(*given: object) -> None:
        raise error

    monkeypatch.setattr(recovery, "write_state", fails)
    assert command("mine", "--iterations", "3", "--save-every", "2", "--name", "first") == 1
    line = one_line(capsys)
    assert line.startswith("mulki: error: out of memory (") and f"{said}); end other" in line


def test_interrupt_outside_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mulki.runs.metrics.read_matrix", interrupt)
    assert run_command(["metrics", "m.csv"]) == 130
    assert capsys.readouterr().err == "mulki: interrupted\n"


# --- the other commands


def test_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.csv"
    path.write_text(MATRIX)
    assert run_command(["metrics", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"transfer", "average", "last", "forgetting", "bwt"}
    assert found == read_matrix(path).metrics().to_dict()
    assert found["last"] == 80.0 and found["transfer"] == 18.0
    assert run_command(["metrics", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("Transfer", "Average", "Last", "Forgetting", "BWT", "zero-shot", "80.0"):
        assert words in out
    one = " ".join(out.split())
    assert all(line in one for line in definition_lines())


def test_metrics_without_zero_shot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.csv"
    path.write_text(MATRIX.replace("zero-shot,10,20\n", ""))
    assert run_command(["metrics", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["last"] == 80.0


def test_tasks_of_folders(task_folders: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tasks", *task_folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "colours", "classes": sorted(COLOURS)},
        {"name": "shades", "classes": sorted(SHADES)},
    ]
    assert run_command(["tasks", *task_folders]) == 0
    out = capsys.readouterr().out
    assert re.search(r"colours\W+3\W+18\W+15\W+a photo of a \{\}\.", out)


def test_names_of_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tasks"]) == 0
    assert "embedded" in capsys.readouterr().out.splitlines()
    assert run_command(["tasks", "--json"]) == 0
    assert "embedded" in json.loads(capsys.readouterr().out)


def test_tasks_of_the_bundled_pack(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        load_sequence(["embedded"])
    except (InputError, ImportError):
        pytest.skip("the bundled pack is not in this checkout")
    names = []
    for order in ("I", "II"):
        assert run_command(["tasks", "embedded", "--order", order, "--json"]) == 0
        tasks = json.loads(capsys.readouterr().out)
        assert all(t.keys() == {"name", "classes"} and len(t["classes"]) >= 2 for t in tasks)
        names.append([t["name"] for t in tasks])
    assert len(names[0]) == 6 and sorted(names[0]) == sorted(names[1]) and names[0] != names[1]
    assert run_command(["tasks", "embedded", "--order", "IX"]) == 2
    assert "IX" in one_line(capsys)


@pytest.mark.parametrize("arguments", [["--version"], []])
def test_version_and_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run_command(arguments) == 0
    out = capsys.readouterr().out
    wanted = [__version__] if arguments else ["usage: mulki", "run ", "metrics ", "tasks "]
    assert all(words in out for words in wanted)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--help"], ["usage: mulki", "run"]),
        (["-h"], ["usage: mulki", "run"]),
        (["run", "--help"], ["--batch-size", "--continue", "--help-all", "mulki-mini"]),
        (
            ["run", "--help-all"],
            ["--batch-size", "--skip-bad-images", "--eliciting", "default: 0.2"],
        ),
        (["run", "--help", "--method", "lwf"], ["--distill-weight"]),
        (["metrics", "--help"], ["--json", "MATRIX"]),
        (["compare", "--help"], ["--baseline", "--html", "--json", "RUN"]),
        (["tasks", "--help"], ["--order", "NAME"]),
    ],
)
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str], wanted: list[str]) -> None:
    try:
        assert run_command(arguments) == 0
    except SystemExit as leave:  # argparse's own way out
        assert leave.code == 0
    out, error = capsys.readouterr()
    assert all(words in out for words in wanted) and error == ""


def test_tasks_without_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path / "whole", COLOURS, 5)
    given = ["tasks", str(tmp_path / "whole")]
    assert run_command([*given, "--test-fraction", "0.4"]) == 0
    out = capsys.readouterr().out
    assert any({"whole", "3", "9", "6"} <= {*line.split()} for line in out.splitlines())
    for more, said in (
        ([], "no train/ (found: blue/, green/, red/); lay the images out as"),
        (["--test-fraction", "1"], "--test-fraction: got 1.0, wanted a number below 1"),
        (["--test-fraction", "half"], "--test-fraction: got 'half', wanted a number"),
    ):
        assert run_command([*given, *more]) == 2
        assert said in one_line(capsys)


@pytest.mark.parametrize("name", ["--tasks", "--seeds"])
def test_a_list_that_is_given_twice_is_refused(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_command(["run", name, "1", name, "2"]) == 2
    assert f"{name}: got it twice; pass all values behind one" in one_line(capsys)


def test_tasks_are_shown_as_a_run_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "colours", COLOURS)
    broken = tmp_path / "colours" / "train" / "red" / "broken.png"
    broken.write_bytes(b"no image")
    assert run_command(["tasks", str(tmp_path / "colours")]) == 2
    assert "or pass --skip-bad-images" in one_line(capsys)
    assert run_command(["tasks", str(tmp_path / "colours"), "--skip-bad-images"]) == 0
    assert "colours: unreadable images left out: 1" in capsys.readouterr().out
    (tmp_path / "a.csv").write_text("a;b\n")
    assert run_command(["tasks", str(tmp_path / "a.csv"), "--csv-separator", ";"]) == 2
    assert "no column path (found: a, b)" in one_line(capsys)


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_a_self_test_of_no_possible_length(
    capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    assert run_command(["doctor", "--seconds", seconds]) == 2
    assert "--seconds: got " in one_line(capsys)
