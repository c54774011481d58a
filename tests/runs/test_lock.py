from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mulki.errors import InputError
from mulki.runs import lock
from mulki.runs.lock import FolderLock, is_locked
from tests import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="flock")

# Without the package's own __init__, which imports torch.
HOLD = f"""
import os, sys, time, types
from pathlib import Path
package = types.ModuleType("mulki")
package.__path__ = [{str(ROOT / "mulki")!r}]
sys.modules["mulki"] = package
from mulki.runs.lock import FolderLock
try:
    lock = FolderLock(Path(sys.argv[1]))
except ValueError:
    print("taken", flush=True)
    sys.exit()
if "fork" not in sys.argv or os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def other(folder: Path, *words: str) -> tuple[subprocess.Popen[str], str]:
    """Another process, which keeps the lock, and what it says: "taken", or who sleeps."""
    command = [sys.executable, "-c", HOLD, str(folder), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_one_process_has_it_and_a_dead_one_does_not_keep_it(tmp_path: Path) -> None:
    one, said = other(tmp_path)
    try:
        assert int(said) == one.pid
        with pytest.raises(InputError, match="another run is writing"):
            FolderLock(tmp_path)
        one.kill()
        one.wait()
        lock = FolderLock(tmp_path)
        two, said = other(tmp_path)
        two.wait()
        assert said == "taken"
        lock.release()
        lock.release()
        FolderLock(tmp_path)
    finally:
        one.kill()
    assert not list(tmp_path.iterdir())


def test_a_process_that_a_dead_one_has_forked_does_not_keep_it(tmp_path: Path) -> None:
    one, said = other(tmp_path, "fork")
    assert int(said) != one.pid
    try:
        with pytest.raises(InputError):
            FolderLock(tmp_path)
        one.kill()
        one.wait()
        FolderLock(tmp_path)
    finally:
        os.kill(int(said), signal.SIGKILL)


def test_whether_it_is_taken_can_be_seen(tmp_path: Path) -> None:
    assert is_locked(tmp_path) is False
    process, _ = other(tmp_path)
    try:
        assert is_locked(tmp_path) is True
    finally:
        process.kill()
        process.wait()
    assert is_locked(tmp_path) is False
    FolderLock(tmp_path).release()  # looking has left it free


def test_a_look_at_it_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = os.open(tmp_path, os.O_RDONLY)
    lock.fcntl.flock(looking, lock.fcntl.LOCK_SH)
    waits = []

    def look_ends(seconds: float) -> None:
        waits.append(seconds)
        os.close(looking)

    monkeypatch.setattr(lock.time, "sleep", look_ends)
    held = FolderLock(tmp_path)
    assert len(waits) == 1 and is_locked(tmp_path) is True
    held.release()
    assert is_locked(tmp_path) is False


def test_it_goes_with_the_object(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(InputError):
        FolderLock(tmp_path)
    del lock
    FolderLock(tmp_path)
