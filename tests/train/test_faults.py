"""Every system call that writes fails once, in turn, and the run goes on afterwards."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mulki.train.saving.recovery import read_state
from tests.sweeps import swept
from tests.train.run_helpers import check_same
from tests.train.test_killed import Killed, needs_fork, runs

pytestmark = needs_fork
CALLS, ALLOCATIONS = "fail_system_call", "fail_allocation"
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
    status, calls = faulty.run("whole", counted=CALLS, at=(0, 0))
    assert status == 0 and calls > 100
    return Path(faulty.options["logs"]) / "whole", calls


@pytest.fixture(scope="module")
def allocations(faulty: Killed) -> int:
    """In how many places of a run memory could have run out while it saves."""
    status, places = faulty.run("allocations", counted=ALLOCATIONS)
    assert status == 0 and places > 1000
    return places


def check_fault(faulty: Killed, whole: Path, counted: str, number: int, *error: int) -> None:
    folder = whole.parent / f"{counted}-{number}"
    status, _ = faulty.run(folder.name, counted=counted, at=(number, *error))
    assert status in (0, 1), f"{counted} {number}: status {status}"
    if status == 1:
        text = folder.with_name(f"{folder.name}.error").read_text()
        meant = "MemoryError: " if counted == ALLOCATIONS else "OSError: "
        assert text.startswith((meant, "InputError: ")) and len(text.splitlines()) == 1, text
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
    check_fault(faulty, folder, CALLS, number, errno.ENOSPC)


@pytest.mark.long
def test_calls_all_over_a_run_that_fail(faulty: Killed, untouched: tuple[Path, int]) -> None:
    """All take three quarters of an hour of processor time."""
    folder, calls = untouched
    for number in swept(calls, 100):
        check_fault(faulty, folder, CALLS, number, ERRORS[number % len(ERRORS)])


@pytest.mark.slow
def test_memory_that_runs_out_while_a_run_saves(
    faulty: Killed, untouched: tuple[Path, int], allocations: int
) -> None:
    folder, _ = untouched
    number = allocations // 2
    print(f"allocation {number} of {allocations} fails")
    check_fault(faulty, folder, ALLOCATIONS, number)


@pytest.mark.long
def test_memory_that_runs_out_all_over_a_run(
    faulty: Killed, untouched: tuple[Path, int], allocations: int
) -> None:
    """All take an hour of processor time."""
    folder, _ = untouched
    for number in swept(allocations, 200):
        check_fault(faulty, folder, ALLOCATIONS, number)
