"""Signals that end a run, and wait while a training step or a save is under way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mulki.errors import Stopped

_SAME = 2.0  # seconds
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Signals:
    """SIGINT, SIGTERM and SIGHUP raise `Stopped`: at once, or later where they are `held`.

    A second one raises it at once in any case, but for one that is the same, other than SIGINT,
    within two seconds. A signal that the process was started to ignore, as
    nohup does with SIGHUP, stays ignored. In a thread other than the main one, signals are left as
    they are.

    Attributes:
        pending: the number of the signal that waits, or None.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._last, self._since = 0, 0.0
        self._held = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait for the end of the block, which does not raise: see `raise_pending`."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def hold(self) -> None:
        """Let signals wait from now on: the process is about to end anyway."""
        self._held += 1

    def raise_pending(self) -> None:
        """Raise `Stopped` if a signal has waited."""
        if self.pending is not None:
            raise Stopped(self.pending)

    def _received(self, number: int, frame: FrameType | None) -> None:
        # Data loading processes inherit the handler, and have nothing to wait for.
        if os.getpid() == self._process:
            # Sent to all processes, torchrun passes its own on besides.
            again = number == self._last != signal.SIGINT
            if again and time.monotonic() < self._since + _SAME:
                return
            self._last, self._since = number, time.monotonic()
            if self._held and self.pending is None:
                self.pending = number
                return
        raise Stopped(number)
