"""`mulki` as a process: signals, exit status, and no more than one line for bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mulki.app.cli import main, run_command
from mulki.errors import Stopped
from mulki.runs.metrics import read_matrix
from tests import ROOT, train_helpers
from tests.cli_helpers import WAIT_S, program, without_progress

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model
task_folders = train_helpers.task_folders


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a Linux device")
def test_output_that_cannot_be_written_is_one_line() -> None:
    words = [sys.executable, "-m", "mulki", "tasks", "embedded", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert re.fullmatch(r"mulki: error: .*No space left on device\n", done.stderr)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_interrupted_process(
    tmp_path: Path, start_model: dict[str, str], task_folders: Sequence[str]
) -> None:
    folder = tmp_path / "logs" / "first"
    given = ["run", *task_folders, "--model", start_model["model"], "--device", "cpu"]
    place = ["--logs", str(tmp_path / "logs"), "--name", "first"]
    endless = ["--iterations", "1000000", "--log-every-n-steps", "1"]
    process = program(*given, *place, *endless)
    try:
        deadline = time.monotonic() + WAIT_S
        log = folder / "out.log"
        while not (log.exists() and "colours step 3:" in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert without_progress(error) == [
        "mulki: interrupted",
        f"results so far: {folder / 'report.html'}",
        f"to go on: mulki run --resume {folder}",
    ]
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    matrix = read_matrix(folder / "matrix.csv")
    assert matrix.zero_shot is not None and matrix.tasks == ()
    assert "run stopped by Stopped: SIGINT" in log.read_text()


def test_a_process_that_is_asked_to_end_goes_on_later(
    tmp_path: Path, start_model: dict[str, str], task_folders: Sequence[str]
) -> None:
    folder = tmp_path / "logs" / "first"
    given = ["run", *task_folders, "--model", start_model["model"], "--device", "cpu"]
    place = ["--logs", str(tmp_path / "logs"), "--name", "first"]
    workers = ["--workers", "1", "--augment", "crop"]
    process = program(*given, *place, *workers, "--iterations", "40", "--log-every-n-steps", "1")
    try:
        deadline = time.monotonic() + WAIT_S
        log = folder / "out.log"
        while not (log.exists() and "colours step 3:" in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        # To all processes, as a job's manager does.
        os.killpg(process.pid, signal.SIGTERM)
        _, error = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert without_progress(error) == [
        "mulki: interrupted",
        f"results so far: {folder / 'report.html'}",
        f"to go on: mulki run --resume {folder}",
    ]
    assert "run stopped by Stopped: SIGTERM" in log.read_text()
    for page in ("summary.md", "report.html"):
        assert "interrupted" in (folder / page).read_text()
    steps = re.findall(r"colours step (\d+):", log.read_text())
    assert run_command(["run", "--resume", str(folder)]) == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "complete"
    again = re.findall(r"colours step (\d+):", log.read_text())
    # It goes on after the step that the signal came in.
    assert list(map(int, again)) in (
        list(range(1, 41)), [*range(1, len(steps) + 1), *range(len(steps) + 2, 41)]
    )  # fmt: skip


def test_bad_input_of_a_process_is_one_line(tmp_path: Path, task_folders: Sequence[str]) -> None:
    (tmp_path / "logs" / "taken").mkdir(parents=True)
    (tmp_path / "logs" / "taken" / "x").touch()
    place = ["--logs", str(tmp_path / "logs"), "--name", "taken"]
    process = program("run", *task_folders, "--model", "RN50", "--pretrained", "none", *place)
    out, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2 and out == ""
    assert len(error.splitlines()) == 1 and str(tmp_path / "logs" / "taken") in error


def test_a_name_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("after_task,花\nzero-shot,10\n花,20\n", encoding="utf-8")
    code = "from mulki.app.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "metrics", str(tmp_path / "m.csv")],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u82b1" in done.stdout


def test_exit_status_of_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(path: Path) -> None:
        raise Stopped(signal.SIGHUP)

    monkeypatch.setattr("mulki.runs.metrics.read_matrix", stopped)
    assert run_command(["metrics", "m.csv"]) == 128 + signal.SIGHUP


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mulki", "metrics", "gone.csv"])
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == 2
