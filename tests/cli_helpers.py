"""`mulki run` of a tiny model and tasks, and what a command prints when its input is bad."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mulki.app.cli import run_command
from tests import ROOT
from tests.train_helpers import COLOURS, without_figures, write_task


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task folder that a test may damage."""
    return write_task(tmp_path / "mine", COLOURS, train=2, test=2)


@pytest.fixture
def command(
    tmp_path: Path, start_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`mulki run` with the tiny model, its run folders in tmp_path/logs."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str, model: bool = True) -> int:
        chosen = ["--model", start_model["model"]] if model else []
        fixed = ["--device", "cpu", "--precision", "fp32", "--batch-size", "4"]
        with without_figures():
            return run_command(["run", *chosen, *fixed, *arguments])

    return go


WAIT_S = 600  # of a busy machine; seconds otherwise

# What a run says before an error: its plan, and results and progress so far.
SAID = re.compile(
    r"(run|model|device|kernels|steps|uses|memory|results) +|goes on after |expected: "
    r"|test of the start model: |after |\d\d:\d\d:\d\d |mulki: "
)


def without_progress(error: str) -> list[str]:
    """The lines of standard error from the error or interrupt on; the others are progress."""
    lines = error.splitlines()
    first = next(i for i, x in enumerate(lines) if re.match("mulki: (error|interrupted)", x))
    assert all(SAID.match(line) for line in lines[:first]), lines
    return lines[first:]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, error = capsys.readouterr()
    assert out == "" and error.endswith("\n"), (out, error)
    (line,) = without_progress(error)
    assert line.startswith("mulki: error: ")
    return line + "\n"


def program(*arguments: str) -> subprocess.Popen[str]:
    # A process that a shell or nohup has started in the background ignores some signals.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "hasattr(signal, 'SIGHUP') and signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from tests.train_helpers import without_figures\n"
        "from mulki.app.cli import main\nwith without_figures(): main()"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal can be sent to all of its processes
    )
