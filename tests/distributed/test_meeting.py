"""Processes that meet in a store with what earlier ones have left there."""

from __future__ import annotations

import datetime
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from mulki.distributed.meeting import Meeting, meet
from mulki.errors import ProcessLost


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
