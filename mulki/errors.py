"""The exceptions of the package, and what their messages and others are worded with."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable

from mulki.printing import printable


class InputError(ValueError):
    """Bad input from the user: an argument, a file, a name.

    The message is one line that says which argument or file, what came, what was wanted and
    what to do about it. The command line prints that line alone and exits with status 2. A file
    name can contain anything: line breaks become spaces, and control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        # torch raises the error of a loading process again with its whole traceback as the message,
        # which ends with the name of the class and the real message.
        kind = type(self)
        message = message.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2]
        super().__init__(printable(" ".join(message.splitlines())))


def says_no_memory(error: Exception) -> bool:
    """Whether memory has ended; torch has a type of its own for accelerators, none for the CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)


class Stopped(KeyboardInterrupt):
    """A signal has asked the run to end.

    Args:
        number: of the signal.

    Attributes:
        resume: the folder that the run can go on from, None if there is none.
        results: the folder that holds results so far, None if there are none.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.resume: str | None = None
        self.results: str | None = None


class ProcessLost(RuntimeError):
    """Another process of the same run has ended, so this one cannot go on.

    Args:
        message: which one, and how it was noticed.
        quiet: whether another process prints it.

    Attributes:
        resume, results: as of `Stopped`.
    """

    def __init__(self, message: str, quiet: bool = False) -> None:
        super().__init__(message)
        self.quiet = quiet
        self.resume: str | None = None
        self.results: str | None = None


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``' (did you mean "x"?)'`` for the choice most like ``name``, or ``''``.

    Upper and lower case are not told apart. The result follows the name in the message of an
    `InputError`, without a space between them.
    """
    by_folded = {choice.casefold(): choice for choice in choices}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f' (did you mean "{by_folded[found[0]]}"?)' if found else ""


def counted(number: int, noun: str) -> str:
    """Such as "1 task" and "2 tasks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
