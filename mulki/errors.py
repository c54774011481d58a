"""The errors that a user sees: bad input, and a process of the run that has ended."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user: an argument, a file, a name.

    The message is one line that says which argument or file, what came, what was wanted and
    what to do about it. The command line prints that line alone and exits with status 2; line
    breaks in the message (a file name can hold one) become spaces, so that it stays one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class ProcessLost(RuntimeError):
    """Another process of the same run has ended, so this one cannot go on."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``' (did you mean "x"?)'`` for the choice most like ``name``, or ``''``.

    Case is ignored, since a wrong case is the commonest slip. The result is meant to be put
    straight behind the name in an :class:`InputError`.
    """
    by_folded = {choice.casefold(): choice for choice in choices}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f' (did you mean "{by_folded[found[0]]}"?)' if found else ""
