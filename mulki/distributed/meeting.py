"""How the processes of a run find each other in a store that may hold what earlier ones have left.

torchrun's store outlives a restart. How often the processes were started again tells one start from
another on one machine alone: on several, each torchrun counts the failures that it has seen itself.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mulki.errors import ProcessLost

_KEY = "meeting"
_POLL_S = 0.05


@dataclass(frozen=True)
class Meeting:
    """Processes that were started together.

    Attributes:
        store: for them alone.
        rank: number of this process.
        size: number of processes.
        words: what each has said, by number.
    """

    store: Any
    rank: int
    size: int
    words: tuple[str, ...]

    def told_by_first(self, key: str, value: Any) -> Any:
        """What the first process has as `value`, in JSON's terms; all have to ask, once for a key.

        Args:
            key: what it is about.
            value: of this process; of no use but in the first one.
        """
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
        return json.loads(self.store.get(key))


def meet(store: Any, rank: int, size: int, word: str) -> Meeting:
    """Wait until all processes have come.

    The first one names the meeting anew. Each other one answers to the name, which may be an old
    one, with a mark of its own, until it finds that mark in the list of those who have come.

    Args:
        store: that all of them share; how long it waits for a key is how long one waits here.
        rank: number of this process.
        size: number of processes.
        word: for the others to know.

    Raises:
        ProcessLost: some have not come in time.
    """
    mark = uuid.uuid4().hex
    if rank == 0:
        store.set(_KEY, mark)

    def ask() -> tuple[str, list[Any]] | None:
        if rank == 0:
            return _gathered(store, mark, size, word)
        return _answered(store, mark, rank, size, word)

    name, came = _wait(store, ask)
    words = tuple(word for _, word in came)
    return Meeting(dist.PrefixStore(name, store), rank, size, words)


def _gathered(store: Any, mark: str, size: int, word: str) -> tuple[str, list[Any]] | None:
    answers = [f"{mark} {other}" for other in range(1, size)]
    if not all(store.check([answer]) for answer in answers):
        return None
    came = [[mark, word], *(json.loads(store.get(answer)) for answer in answers)]
    store.set(f"{mark} all", json.dumps(came))
    return mark, came


def _answered(
    store: Any, mark: str, rank: int, size: int, word: str
) -> tuple[str, list[Any]] | None:
    if not store.check([_KEY]):
        return None
    name = store.get(_KEY).decode()
    store.set(f"{name} {rank}", json.dumps([mark, word]))
    if not store.check([f"{name} all"]):
        return None
    came = json.loads(store.get(f"{name} all"))
    return (name, came) if len(came) == size and came[rank][0] == mark else None


def _wait(store: Any, ask: Callable[[], tuple[str, list[Any]] | None]) -> tuple[str, list[Any]]:
    seconds = store.timeout.total_seconds()
    end = time.monotonic() + seconds
    while (found := ask()) is None:
        if time.monotonic() > end:
            raise ProcessLost(
                f"not all processes of the run have come within {seconds:g} s; look for the "
                "messages of the others"
            )
        time.sleep(_POLL_S)
    return found
