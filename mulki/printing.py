"""Control characters in names from elsewhere are shown, and never reach a terminal.

A file, a class or a member of an archive can have a name that moves the cursor or hides a line.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TextIO

# C0 and C1; separators of lines; what turns the direction of writing; halves of surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""The text with control characters escaped, as ``\x1b``, but for those of ``keep``."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return _CONTROL.sub(escaped, text)


def say(line: str, file: TextIO | None = None) -> None:
    """Print one line, on standard output by default, see `printable`."""
    print(printable(line), file=file or sys.stdout)


class PrintableFormatter(logging.Formatter):
    """A message is one line, as `say` prints it; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, *given: object) -> str:
        return printable(super().formatException(*given), keep="\n")  # type: ignore[arg-type]
