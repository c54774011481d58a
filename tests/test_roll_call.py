"""What a process says of the others, from what they said or did not say."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch.distributed as dist

from mulki import roll_call
from mulki.errors import ProcessLost
from mulki.roll_call import RollCall


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "GRACE_S", 0.1)


def called(said: Mapping[int, str], rank: int = 0, stopped: bool = False) -> ProcessLost | None:
    """What a process of four says when those of `said` have said a word each."""
    store = dist.HashStore()
    rolls = [RollCall(store, each, 4) for each in range(4)]
    rolls[rank].say("stopped" if stopped else "lost")
    for other, word in said.items():
        rolls[other].say(word, "why")  # type: ignore[arg-type]
    return rolls[rank].call("closed", stopped)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({1: "lost", 2: "lost"}, r"^process 3 \(pid \d+ on .+\) was killed or hangs: .*\(closed\)"),
        ({2: "stopped"}, r"^process 1 \(.*\), process 3 \(.*\) were killed or hang: "),
        ({1: "lost", 3: "failed"}, r"^process 3 \(.*\) has failed: why$"),
        ({1: "lost", 2: "stopped", 3: "lost"}, r"^process 2 \(.*\) got a signal to stop"),
        ({1: "lost", 2: "lost", 3: "lost"}, r"^a connection between the processes was lost"),
    ],
)
def test_who_is_to_blame(said: dict[int, str], wanted: str) -> None:
    found = called(said)
    assert found is not None and re.search(wanted, str(found)), found


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
