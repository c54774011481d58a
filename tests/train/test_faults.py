"""Every system call that writes fails once, in turn, and the run goes on afterwards."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mulki.train.saving.recovery import read_state
from tests.train.run_helpers import check_same
from tests.train.test_killed import Killed, needs_fork, runs

pytestmark = needs_fork
ERRORS = (errno.ENOSPC, errno.EIO)


@pytest.fixture(scope="module")
def faulty(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Killed]:
    folder = tmp_path_factory.mktemp("faults")
    shim, source = folder / "faults.so", Path(__file__).with_name("faults.c")
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", shim, "-ldl"], check=True)
    yield from runs(folder, start_model, task_folders, LD_PRELOAD=str(shim))


@pytest.fixture(scope="module")
def untouched(faulty: Killed) -> tuple[Path, int]:
    """The folder of a run without a fault, and how many of its calls could have failed."""
    status, calls = faulty.run("whole", fault=(0, 0))
    assert status == 0 and calls > 100
    return Path(faulty.options["logs"]) / "whole", calls


def check_fault(faulty: Killed, whole: Path, number: int) -> None:
    code = ERRORS[number % len(ERRORS)]
    folder = whole.parent / f"fault-{number}"
    error = folder.with_name(f"{folder.name}.error")
    status, _ = faulty.run(folder.name, fault=(number, code))
    assert status in (0, 1), f"call {number}: status {status}"
    if status == 1:
        text = error.read_text()
        assert text.startswith(("OSError: ", "InputError: ")) and len(text.splitlines()) == 1, text
    if folder.is_dir():
        read_state(folder)  # raises where the last save is damaged
    faulty.finish(folder.name)
    check_same(folder, whole)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_call_that_fails(faulty: Killed, untouched: tuple[Path, int]) -> None:
    folder, calls = untouched
    number = calls // 2
    print(f"call {number} of {calls} fails")
    check_fault(faulty, folder, number)


@pytest.mark.long
def test_calls_all_over_a_run_that_fail(faulty: Killed, untouched: tuple[Path, int]) -> None:
    """One in sixty: all take an hour."""
    folder, calls = untouched
    for number in range(10, calls + 1, 60):
        print(f"call {number} of {calls} fails")
        check_fault(faulty, folder, number)
