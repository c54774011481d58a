"""Which process of a run has ended, found out by those that are left.

A process that is killed or hangs says nothing. So each of the others says that it has lost one, in
the store that the processes met in, and those that stay silent are the ones to name.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Any, Literal

import torch.distributed as dist

from mulki.errors import ProcessLost

Word = Literal["lost", "stopped", "failed"]

#: Seconds that a process which is alive has to say so, once another has met a closed connection.
GRACE_S = 10.0

_POLL_S = 0.05


class RollCall:
    """What the processes of a run say before they end.

    Args:
        store: of the process group.
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int):
        self._store = dist.PrefixStore("mulki", store)
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._said = False
        self._store.set(f"place {rank}", f"pid {os.getpid()} on {socket.gethostname()}")

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
            silent = [rank for rank in self._others if rank not in said]
            failed = [rank for rank, answer in said.items() if answer.startswith("failed")]
            if failed:
                # It prints the error itself.
                text = said[failed[0]].removeprefix("failed ")
                return ProcessLost(f"{self._names(failed[:1])} has failed: {text}", quiet=True)
            if silent:
                verb = "was killed or hangs" if len(silent) == 1 else "were killed or hang"
                return ProcessLost(
                    f"{self._names(silent)} {verb}: no answer within {GRACE_S:g} s ({reason}); "
                    "the system's log says whether memory ran out",
                    quiet=self._rank > min(said, default=self._rank),
                )
            if stopped:
                return None
            by_signal = [rank for rank, answer in said.items() if answer.startswith("stopped")]
            if by_signal:
                return ProcessLost(f"{self._names(by_signal)} got a signal to stop", quiet=True)
            return ProcessLost(
                f"a connection between the processes was lost, all of which still answer "
                f"({reason}); check the network",
                quiet=self._rank > min(said),
            )
        except RuntimeError:
            return ProcessLost(
                f"another process of the run has ended, and the store that they met in with it "
                f"({reason})"
            )

    def _answers(self) -> dict[int, str]:
        # Those of the other processes that say something in time.
        end = time.monotonic() + GRACE_S
        said: dict[int, str] = {}
        while True:
            for rank in self._others:
                if rank not in said and self._store.check([f"said {rank}"]):
                    said[rank] = self._store.get(f"said {rank}").decode()
            failed = any(answer.startswith("failed") for answer in said.values())
            if failed or len(said) == len(self._others) or time.monotonic() > end:
                return said
            time.sleep(_POLL_S)

    def _names(self, ranks: list[int]) -> str:
        named = []
        for rank in ranks:
            key = f"place {rank}"
            place = self._store.get(key).decode() if self._store.check([key]) else "never joined"
            named.append(f"process {rank} ({place})")
        return ", ".join(named)
