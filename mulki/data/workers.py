"""The processes that load images: how they start, and what is said of one that has ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mulki.data.decoding import limit_pixels
from mulki.errors import InputError

# A loading process whose run was killed ends within so many seconds.
_ORPHANS_END_S = 5


def watched(start: Callable[[], Iterator[Any]], workers: int) -> Iterator[Any]:
    """The batches of a torch `DataLoader`.

    Args:
        start: to its iterator; starts its processes.
        workers: how many there are.

    Raises:
        InputError: a loading process has ended, or has no shared memory left.
    """
    if not workers:
        yield from start()
        return
    with _named(workers):
        try:
            yield from _ends.told(start())
        except (EOFError, ConnectionError) as error:
            # Those of the reader's own come from here, or with this word from a process.
            if str(error).startswith("Caught "):
                raise
            raise RuntimeError("DataLoader worker ended as it handed over a batch") from error


class _EndsOfWorkers:
    """Keeps torch's error about a loading process that has ended until a batch is waited for.

    torch raises it in a signal handler, so wherever the main thread is. Code in C that is called
    there may take it for an error of its own, drop it, and go on with half a result.
    """

    def __init__(self) -> None:
        self._error: RuntimeError | None = None
        self._waiting = False
        self._handler: Any = None

    def told(self, loaded: Iterator[Any]) -> Iterator[Any]:
        """The batches of a loader that has started its processes.

        Args:
            loaded: an iterator of torch's `DataLoader`.

        Raises:
            RuntimeError: torch's, from the first batch that is waited for after a process ended.
        """
        self._listen()
        # Of a loader that nobody has waited for again; of others, torch tells within 5 s.
        self._error = None
        while True:
            self._waiting = True
            try:
                self._tell()
                batch = next(loaded, None)
            except RuntimeError:
                self._error = None
                raise
            finally:
                self._waiting = False
            self._tell()
            if batch is None:
                return
            yield batch

    def hear(self, number: int, frame: Any) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            # torch says it once for all processes that have ended.
            if not str(error).startswith("DataLoader worker"):
                raise
            self._error = error
            if self._waiting:
                raise

    def _listen(self) -> None:
        number = getattr(signal, "SIGCHLD", None)
        if number is None or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(number)
        if callable(handler) and handler != self.hear:
            self._handler = handler
            signal.signal(number, self.hear)

    def _tell(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


_ends = _EndsOfWorkers()


@contextmanager
def _named(workers: int) -> Iterator[None]:
    # Turns torch's error about a loading process that has ended into one that says what to do.
    try:
        yield
    except RuntimeError as error:
        # It has no type of its own. Of an error that a loading process has met in its own code,
        # torch says "Caught ... in DataLoader worker".
        if "unable to allocate shared memory" in str(error):
            raise InputError(
                f"--workers {workers}: shared memory is full, by which a data loading process "
                "hands over images; lower --workers, or make /dev/shm larger (docker run "
                "--shm-size)"
            ) from None
        if not str(error).startswith("DataLoader worker"):
            raise
        raise InputError(
            f"--workers {workers}: a data loading process has ended ({error}), as one does that "
            "is killed for its memory; lower --workers and start again"
        ) from None


def start_worker(pixels: int, number: int) -> None:
    """Ready a loading process: what ends it, and how many pixels an image may have.

    Args:
        pixels: of the run, see `mulki.data.decoding.limit_pixels`.
        number: of the process.
    """
    limit_pixels(pixels)
    # A terminal and those that manage jobs send a signal to all processes of a run. The run itself
    # needs this one until it has ended the step and made a save.
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    run = multiprocessing.parent_process()
    if run is not None and hasattr(signal, "sigtimedwait"):
        # In a process that was not forked, threads that are there already go on to take it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        ids = run.pid, os.getppid()
        threading.Thread(target=_end_with_the_run, args=ids, daemon=True).start()


def _end_with_the_run(run: int, parent: int) -> None:
    # Ends this process when the run sends SIGTERM, or when its parent has been killed.
    while os.getppid() == parent:
        got = signal.sigtimedwait({signal.SIGTERM}, _ORPHANS_END_S)
        if got is not None and got.si_pid == run:
            break
    os._exit(0)
