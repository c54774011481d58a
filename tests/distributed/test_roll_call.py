"""Processes that meet, and what one says of the others, from what they said or did not say."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mulki.distributed import roll_call
from mulki.distributed.roll_call import Meeting, RollCall, meet
from mulki.errors import ProcessLost

SILENT = r"did not answer within 0\.1 s: killed, busy or hanging"
PLACES = [f"pid {each} on one" for each in range(4)]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "GRACE_S", 0.1)


def called(said: Mapping[int, str], rank: int = 0, stopped: bool = False) -> ProcessLost | None:
    """What a process of four says when those of `said` have said a word each."""
    store = dist.HashStore()
    rolls = [RollCall(store, each, PLACES) for each in range(4)]
    rolls[rank].say("stopped" if stopped else "lost")
    for other, word in said.items():
        rolls[other].say(word, "why")  # type: ignore[arg-type]
    return rolls[rank].call("closed", stopped)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({1: "lost", 2: "lost"}, rf"^process 3 \(pid 3 on one\) {SILENT} \(closed\)"),
        ({2: "stopped"}, rf"^process 1 \(.*\), process 3 \(.*\) {SILENT}"),
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
    one, other = (RollCall(store, rank, PLACES[:2]) for rank in (0, 1))
    one.say("failed", "first")
    one.say("lost", "second")
    assert "has failed: first" in str(other.call("closed"))


def test_a_store_that_has_gone() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    roll = RollCall(dist.TCPStore("127.0.0.1", server.port), 0, PLACES[:2])
    del server
    roll.say("lost")
    assert "the store that they met in" in str(roll.call("closed"))


def met(store: dist.Store, size: int, ranks: list[int]) -> list[Meeting]:
    """What the processes find that come in this order."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        coming = [pool.submit(meet, store, rank, size, f"I am {rank}") for rank in ranks]
        return [each.result() for each in coming]


def _rank(meeting: Meeting) -> int:
    return meeting.rank


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_all_get_one_store_and_the_words_of_all(order: list[int]) -> None:
    store = dist.HashStore()
    first = met(store, 3, order)
    assert [each.rank for each in first] == order
    assert {each.words for each in first} == {("I am 0", "I am 1", "I am 2")}
    assert [each.told_by_first("who", each.rank) for each in sorted(first, key=_rank)] == [0, 0, 0]
    first[0].store.set("key", "of the first meeting")
    assert first[2].store.get("key") == b"of the first meeting"
    # Those that are started again find another one, whoever comes first.
    for again in (met(store, 3, order), met(store, 3, order[::-1])):
        assert not any(each.store.check(["key"]) for each in again)
        again[1].store.set("key", "of another one")
        assert again[0].store.get("key") == b"of another one"
    # A run on another number of machines does not take itself for the one before.
    assert {each.words for each in met(store, 2, [1, 0])} == {("I am 0", "I am 1")}


def test_an_answer_of_a_process_that_has_ended_is_not_taken_for_the_next_one() -> None:
    store = dist.HashStore()
    met(store, 2, [0, 1])
    name = store.get("meeting").decode()
    # The process that comes now finds the old name, and its list, with the mark of another one.
    came = json.loads(store.get(f"{name} all"))
    store.set_timeout(datetime.timedelta(seconds=0.3))
    with pytest.raises(ProcessLost, match="not all processes of the run have come within 0.3 s"):
        meet(store, 1, 2, "late")
    assert came == json.loads(store.get(f"{name} all"))


def test_one_that_never_comes() -> None:
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.2))
    with pytest.raises(ProcessLost, match="within 0.2 s"):
        meet(store, 0, 2, "alone")


def test_a_process_alone() -> None:
    assert meet(dist.HashStore(), 0, 1, "me").words == ("me",)
