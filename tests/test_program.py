"""`mulki` as a process: signals, exit status, and no more than one line for an error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
    words = [sys.executable, "-m", "mulki", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert re.fullmatch(r"mulki: error: .*No space left on device\n", done.stderr)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.fixture
def signalled(
    tmp_path: Path, start_model: dict[str, str], task_folders: Sequence[str]
) -> Callable[..., Path]:
    """The folder of a run that a signal ends after the third step."""

    def run(send: Callable[[int, int], None], number: signal.Signals, *words: str) -> Path:
        folder = tmp_path / "logs" / "first"
        given = ["run", *task_folders, "--model", start_model["model"], "--device", "cpu"]
        place = ["--logs", str(tmp_path / "logs"), "--name", "first", "--log-every-n-steps", "1"]
        process = program(*given, *place, *words)
        try:
            deadline = time.monotonic() + WAIT_S
            log = folder / "out.log"
            while not (log.exists() and "colours step 3:" in log.read_text()):
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()
                time.sleep(0.02)
            send(process.pid, number)
            _, error = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
        assert process.returncode == 128 + number
        assert without_progress(error) == [
            "mulki: interrupted",
            f"results so far: {folder / 'report.html'}",
            f"to go on: mulki run --resume {folder}",
        ]
        assert f"run stopped by Stopped: {number.name}" in log.read_text()
        return folder

    return run


def test_interrupted_process(signalled: Callable[..., Path]) -> None:
    folder = signalled(os.kill, signal.SIGINT, "--iterations", "1000000")
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    matrix = read_matrix(folder / "matrix.csv")
    assert matrix.zero_shot is not None and matrix.tasks == ()


@pytest.mark.long
def test_a_process_that_is_asked_to_end_goes_on_later(signalled: Callable[..., Path]) -> None:
    # To all processes, as a job's manager does.
    words = ["--workers", "1", "--augment", "crop", "--iterations", "40"]
    folder = signalled(os.killpg, signal.SIGTERM, *words)
    for page in ("summary.md", "report.html"):
        assert "interrupted" in (folder / page).read_text()
    log = folder / "out.log"
    steps = re.findall(r"colours step (\d+):", log.read_text())
    assert run_command(["run", "--resume", str(folder)]) == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "complete"
    again = re.findall(r"colours step (\d+):", log.read_text())
    # It goes on after the step that the signal came in.
    assert list(map(int, again)) in (
        list(range(1, 41)), [*range(1, len(steps) + 1), *range(len(steps) + 2, 41)]
    )  # fmt: skip


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
