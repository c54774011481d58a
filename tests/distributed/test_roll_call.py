"""What a process says of the others, from what they said or did not say."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch.distributed as dist

from mulki.distributed import roll_call
from mulki.distributed.roll_call import RollCall, identity, lives
from mulki.errors import ProcessLost

SILENT = r"did not answer within 0\.1 s: "
RUNS = "still running, so busy or hanging" if Path("/proc/self/stat").exists() else "killed, busy"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "GRACE_S", 0.1)


def called(
    said: Mapping[int, str],
    rank: int = 0,
    stopped: bool = False,
    places: Mapping[int, str] | None = None,
) -> ProcessLost | None:
    """What a process of four says when those of `said` have said a word each.

    All are this process, but for those that `places` gives an identity.
    """
    store = dist.HashStore()
    rolls = [RollCall(store, each, 4) for each in range(4)]
    for other, who in (places or {}).items():
        dist.PrefixStore("mulki", store).set(f"identity {other}", who)
    rolls[rank].say("stopped" if stopped else "lost")
    for other, word in said.items():
        rolls[other].say(word, "why")  # type: ignore[arg-type]
    return rolls[rank].call("closed", stopped)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({1: "lost", 2: "lost"}, rf"^process 3 \(pid \d+ on .+\) {SILENT}{RUNS} \(closed\)"),
        ({2: "stopped"}, rf"^process 1 \(.*\), process 3 \(.*\) {SILENT}{RUNS}"),
        ({1: "lost", 3: "failed"}, r"^process 3 \(.*\) has failed: why$"),
        ({1: "lost", 2: "stopped", 3: "lost"}, r"^process 2 \(.*\) got a signal to stop"),
        ({1: "lost", 2: "lost", 3: "lost"}, r"^a connection between the processes was lost"),
    ],
)
def test_who_is_to_blame(said: dict[int, str], wanted: str) -> None:
    found = called(said)
    assert found is not None and re.search(wanted, str(found)), found


on_linux = pytest.mark.skipif(identity(os.getpid()) is None, reason="the system says nothing")


@pytest.fixture
def ended() -> Iterator[str]:
    """The identity of a process that was killed, and whose exit status nobody has asked for."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        who = identity(child.pid)
        assert who is not None and lives(who) is True
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        yield who


@on_linux
def test_a_process_that_has_ended_is_told_from_a_busy_one(
    ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without waiting, where all others have answered or have ended.
    monkeypatch.setattr(roll_call, "GRACE_S", 600)
    found = called({1: "lost", 2: "lost"}, places={3: ended})
    assert found is not None and not found.quiet
    assert re.search(r"^process 3 \(.*\) ended without a word, as when killed \(clos", str(found))
    # One that is silent but runs may have been busy.
    monkeypatch.setattr(roll_call, "GRACE_S", 0.1)
    found = called({1: "lost"}, places={3: ended})
    assert found is not None and "process 3" in str(found) and "process 2" not in str(found)
    # It may have said why before it ended.
    found = called({3: "failed"}, places={3: ended})
    assert found is not None and "process 3" in str(found) and "has failed: why" in str(found)


@on_linux
def test_of_a_process_elsewhere_nothing_is_known(ended: str) -> None:
    pid, started, _ = ended.split(maxsplit=2)
    elsewhere = f"{pid} {started} another boot, another namespace"
    assert lives(elsewhere) is None
    found = called({1: "lost", 2: "lost"}, places={3: elsewhere})
    assert found is not None and "0.1 s: killed, busy or hanging (closed)" in str(found)


@on_linux
@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_process_that_cannot_be_looked_up_has_not_ended(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = identity(os.getpid())
    assert here is not None
    real = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "stat":
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert lives(here) is None and identity(os.getpid()) is None
    found = called({1: "lost", 2: "lost"}, places={3: here})
    assert found is not None and "0.1 s: killed, busy or hanging (closed)" in str(found)


@on_linux
def test_one_that_ends_while_it_is_looked_up_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    here = identity(os.getpid())

    def gone(path: Path) -> bytes:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), str(path))

    monkeypatch.setattr(Path, "read_bytes", gone)
    assert here is not None and lives(here) is False


@on_linux
def test_the_number_of_a_process_that_has_ended_may_be_that_of_another(ended: str) -> None:
    _, started, machine = ended.split(maxsplit=2)
    assert lives(f"{os.getpid()} {started}0 {machine}") is False


def test_one_process_prints_it() -> None:
    lost = dict.fromkeys((0, 1, 2), "lost")
    quiet = []
    for rank in lost:
        others = {other: word for other, word in lost.items() if other != rank}
        found = called(others, rank)
        assert found is not None
        quiet.append(found.quiet)
    assert quiet == [False, True, True]
    # One that failed prints it itself.
    failed = called({1: "failed"})
    assert failed is not None and failed.quiet


def test_a_signal_of_its_own_stays_one_unless_another_is_lost() -> None:
    assert called({1: "stopped", 2: "stopped", 3: "lost"}, stopped=True) is None
    found = called({1: "stopped", 2: "stopped"}, stopped=True)
    assert found is not None and "process 3" in str(found)


def test_the_first_word_counts() -> None:
    store = dist.HashStore()
    one, other = RollCall(store, 0, 2), RollCall(store, 1, 2)
    one.say("failed", "first")
    one.say("lost", "second")
    assert "has failed: first" in str(other.call("closed"))


def test_a_store_that_has_gone() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    roll = RollCall(dist.TCPStore("127.0.0.1", server.port), 0, 2)
    del server
    roll.say("lost")
    assert "the store that they met in" in str(roll.call("closed"))
