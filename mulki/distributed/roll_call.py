"""What the processes of a run tell each other in a store: that all have come, and why they end.

torchrun's store outlives a restart, so it may hold what earlier processes have left. A process that
is killed or hangs says nothing, so those that stay silent are the ones to name.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from mulki.errors import ProcessLost

Word = Literal["lost", "stopped", "failed"]

#: Seconds that a process which is alive has to say so, once another has met a closed connection.
GRACE_S = 10.0

_MEETING = "meeting"
_POLL_S = 0.05


@dataclass(frozen=True)
class Meeting:
    """Processes that were started together, their store, and what each has said, by number."""

    store: Any
    rank: int
    size: int
    words: tuple[Any, ...]

    def told_by_first(self, key: str, value: Any) -> Any:
        """What the first process has as `value`, in JSON's terms; all have to ask, once a key."""
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
        return json.loads(self.store.get(key))


def meet(store: Any, rank: int, size: int, word: Any) -> Meeting:
    """Wait until all processes have come.

    The first one names the meeting anew. Each answers to the name, which may be an old one, with a
    mark of its own, until it finds that mark in the list of those who have come. How often torchrun
    has started them tells nothing: on several machines each counts the failures that it has seen.

    Args:
        store: that all of them share; how long it waits for a key is how long one waits here.
        word: for the others to know, in JSON's terms.

    Raises:
        ProcessLost: some have not come in time.
    """
    mark, seconds = uuid.uuid4().hex, store.timeout.total_seconds()
    end = time.monotonic() + seconds
    if rank == 0:
        store.set(_MEETING, mark)
    while time.monotonic() < end:
        if store.check([_MEETING]):
            name = store.get(_MEETING).decode()
            answers = [f"{name} {each}" for each in range(size)]
            store.set(answers[rank], json.dumps([mark, word]))
            if rank == 0 and store.check(answers):
                all_of_them = [json.loads(store.get(answer)) for answer in answers]
                store.set(f"{name} all", json.dumps(all_of_them))
            came = json.loads(store.get(f"{name} all")) if store.check([f"{name} all"]) else []
            if len(came) == size and came[rank][0] == mark:
                words = tuple(word for _, word in came)
                return Meeting(dist.PrefixStore(name, store), rank, size, words)
        time.sleep(_POLL_S)
    raise ProcessLost(
        f"not all processes of the run have come within {seconds:g} s; look for the messages of "
        "the others"
    )


class RollCall:
    """What the processes of a run say before they end.

    Args:
        store: of the process group.
        rank: number of this process.
        places: of each process its number and machine, for messages.
    """

    def __init__(self, store: Any, rank: int, places: Sequence[str]):
        self._store = dist.PrefixStore("mulki", store)
        self._rank = rank
        self._names = [f"process {each} ({place})" for each, place in enumerate(places)]
        self._said = False

    def say(self, word: Word, text: str = "") -> None:
        """Tell the others why this process ends; the first word counts."""
        if not self._said:
            self._said = True
            # The store may have gone with the machine that held it.
            with contextlib.suppress(RuntimeError):
                self._store.set(f"said {self._rank}", f"{word} {text}")

    def call(self, reason: str, stopped: bool = False) -> ProcessLost | None:
        """Wait for what the others say; the error that names those to blame.

        Args:
            reason: how this process has noticed.
            stopped: whether it was by a signal of its own. Without anybody to blame the result is
                None then.
        """
        try:
            said = self._answers()
        except RuntimeError:
            return ProcessLost(
                f"another process of the run has ended, and the store that they met in with it "
                f"({reason})"
            )
        for rank, answer in said.items():
            if answer.startswith("failed"):
                # It prints the error itself.
                text = answer.removeprefix("failed ")
                return ProcessLost(f"{self._names[rank]} has failed: {text}", quiet=True)
        quiet = self._rank > min(said, default=self._rank)
        silent = [name for rank, name in enumerate(self._names) if rank not in said]
        silent.remove(self._names[self._rank])
        if silent:
            return ProcessLost(
                f"{', '.join(silent)} did not answer within {GRACE_S:g} s: killed, busy or hanging "
                f"({reason}); the system's log says whether memory ran out, --process-timeout how "
                "long a process waits for the others",
                quiet,
            )
        if stopped:
            return None
        for rank, answer in said.items():
            if answer.startswith("stopped"):
                return ProcessLost(f"{self._names[rank]} got a signal to stop", quiet=True)
        return ProcessLost(
            f"a connection between the processes was lost, all of which still answer ({reason}); "
            "check the network",
            quiet,
        )

    def _answers(self) -> dict[int, str]:
        # What the other processes say in time.
        others = [rank for rank in range(len(self._names)) if rank != self._rank]
        end = time.monotonic() + GRACE_S
        said: dict[int, str] = {}
        while True:
            for rank in others:
                if rank not in said and self._store.check([f"said {rank}"]):
                    said[rank] = self._store.get(f"said {rank}").decode()
            failed = any(answer.startswith("failed") for answer in said.values())
            if failed or len(said) == len(others) or time.monotonic() > end:
                return said
            time.sleep(_POLL_S)
