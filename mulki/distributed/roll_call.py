"""Which process of a run has ended, found out by those that are left.

A process that is killed or hangs says nothing. So each of the others says that it has lost one, in
the store that the processes met in, and those that stay silent are the ones to name. On one machine
the system tells which of them have ended; one that still runs may only be busy.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from mulki.errors import ProcessLost

Word = Literal["lost", "stopped", "failed"]

#: Seconds that a process which is alive has to say so, once another has met a closed connection.
GRACE_S = 10.0

_POLL_S = 0.05


def identity(pid: int) -> str | None:
    """What tells a process of this machine from all others; None where the system does not say."""
    try:
        started, machine = _started(pid), _machine()
    except OSError:
        return None
    return f"{pid} {started} {machine}" if started and machine else None


def lives(who: str) -> bool | None:
    """Whether the process of an `identity` still runs; None if that cannot be told here and now.

    It cannot of a process of another machine, or while this one can open no more files.
    """
    pid, started, machine = who.split(maxsplit=2)
    try:
        return _started(int(pid)) == started if machine == _machine() else None
    except OSError:
        return None


def _machine() -> str | None:
    # Processes of one boot and one namespace see each other under the same numbers. The name of the
    # machine does not tell: containers may share one.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except FileNotFoundError:
        return None


def _started(pid: int) -> str | None:
    # When a process has started, None if it has ended: the number alone may be that of a later one.
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # What has ended is kept until its parent asks for its exit status.
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


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
        who = identity(os.getpid())
        if who is not None:
            self._store.set(f"identity {rank}", who)

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
            said, ended = self._answers()
            silent = [rank for rank in self._others if rank not in said and rank not in ended]
            failed = [rank for rank, answer in said.items() if answer.startswith("failed")]
            if failed:
                # It prints the error itself.
                text = said[failed[0]].removeprefix("failed ")
                return ProcessLost(f"{self._names(failed[:1])} has failed: {text}", quiet=True)
            quiet = self._rank > min(said, default=self._rank)
            if ended:
                return ProcessLost(
                    f"{self._names(ended)} ended without a word, as when killed ({reason}); "
                    "the system's log says whether memory ran out",
                    quiet,
                )
            if silent:
                runs = all(self._lives(rank) for rank in silent)
                state = "still running, so busy or hanging" if runs else "killed, busy or hanging"
                names = self._names(silent)
                return ProcessLost(
                    f"{names} did not answer within {GRACE_S:g} s: {state} ({reason}); "
                    "--process-timeout says how long a process waits for the others",
                    quiet,
                )
            if stopped:
                return None
            by_signal = [rank for rank, answer in said.items() if answer.startswith("stopped")]
            if by_signal:
                return ProcessLost(f"{self._names(by_signal)} got a signal to stop", quiet=True)
            return ProcessLost(
                f"a connection between the processes was lost, all of which still answer "
                f"({reason}); check the network",
                quiet,
            )
        except RuntimeError:
            return ProcessLost(
                f"another process of the run has ended, and the store that they met in with it "
                f"({reason})"
            )

    def _answers(self) -> tuple[dict[int, str], list[int]]:
        # What the other processes say in time, and which of them have ended without a word.
        end = time.monotonic() + GRACE_S
        said: dict[int, str] = {}
        while True:
            # Before the words are read, for a process that has ended says nothing afterwards.
            gone = [rank for rank in self._others if self._lives(rank) is False]
            for rank in self._others:
                if rank not in said and self._store.check([f"said {rank}"]):
                    said[rank] = self._store.get(f"said {rank}").decode()
            ended = [rank for rank in gone if rank not in said]
            failed = any(answer.startswith("failed") for answer in said.values())
            all_known = len(said) + len(ended) == len(self._others)
            if failed or all_known or time.monotonic() > end:
                return said, ended
            time.sleep(_POLL_S)

    def _lives(self, rank: int) -> bool | None:
        key = f"identity {rank}"
        return lives(self._store.get(key).decode()) if self._store.check([key]) else None

    def _names(self, ranks: list[int]) -> str:
        named = []
        for rank in ranks:
            key = f"place {rank}"
            place = self._store.get(key).decode() if self._store.check([key]) else "never joined"
            named.append(f"process {rank} ({place})")
        return ", ".join(named)
