"""The processes that load images: how they start, and what is said of one that has ended."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
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
    """Keeps torch's error about a loading process that has ended until its batch is waited for.

    torch raises it in a signal handler, so wherever the main thread is. Code in C that is called
    there may take it for an error of its own, drop it, and go on with half a result. Errors about
    processes of other loaders are raised as torch does.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._known: set[int] = set()
        self._waited_for: frozenset[int] = frozenset()
        self._errors: dict[int, RuntimeError] = {}

    def told(self, loaded: Iterator[Any]) -> Iterator[Any]:
        """The batches of a loader that has started its processes.

        Args:
            loaded: an iterator of torch's `DataLoader`.

        Raises:
            RuntimeError: torch's, from the first batch that is waited for after a process ended.
        """
        if threading.current_thread() is not threading.main_thread():
            yield from loaded  # torch handles no signal there
            return
        own = frozenset(process.pid for process in getattr(loaded, "_workers", ()))
        self._listen()
        self._known |= own
        try:
            while True:
                self._waited_for = own
                try:
                    self._tell(own)
                    batch = next(loaded, None)
                finally:
                    self._waited_for = frozenset()
                self._tell(own)
                if batch is None:
                    return
                yield batch
        finally:
            # They stay known: they may live on until the next epoch.
            self._waited_for = frozenset()
            for process in own:
                self._errors.pop(process, None)

    def hear(self, number: int, frame: Any) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            # torch says it once.
            found = re.match(r"DataLoader worker \(pid (\d+)\)", str(error))
            process = int(found[1]) if found else None
            if process not in self._known:
                raise
            self._errors[process] = error
            if process in self._waited_for:
                raise

    def _listen(self) -> None:
        number = getattr(signal, "SIGCHLD", None)
        # Once: a handler that was set since may call this one.
        if number is not None and self._handler is None:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handler = handler
                signal.signal(number, self.hear)

    def _tell(self, own: frozenset[int]) -> None:
        for process in own & self._errors.keys():
            raise self._errors.pop(process)


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
    sys.excepthook = _unless_the_run_left
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


def _unless_the_run_left(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # A run that a signal stops may do so with a batch half taken. The thread of `multiprocessing`
    # that hands it over prints what it then meets, below the last words of the run.
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


def _end_with_the_run(run: int, parent: int) -> None:
    # Ends this process when the run sends SIGTERM, or when its parent has been killed.
    while os.getppid() == parent:
        got = signal.sigtimedwait({signal.SIGTERM}, _ORPHANS_END_S)
        if got is not None and got.si_pid == run:
            break
    os._exit(0)
