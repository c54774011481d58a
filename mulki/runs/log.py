"""``out.log`` of a run."""

from __future__ import annotations

import logging
from pathlib import Path

from mulki.printing import PrintableFormatter


class RunLog:
    """Writes what the package ``mulki`` logs, debugging apart, into a file while it is open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handler: logging.Handler | None = None
        self._level = logging.NOTSET

    def open(self) -> None:
        """Begin; without effect when it is open."""
        if self._handler is not None:
            return
        self._handler = _LogFile(self._path, encoding="utf-8")
        self._handler.setLevel(logging.INFO)
        self._handler.setFormatter(
            PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        )
        package = logging.getLogger("mulki")
        package.addHandler(self._handler)
        # Without a level of its own, the package has that of the root logger, WARNING, and the
        # progress would not reach the file.
        self._level = package.level
        if package.level == logging.NOTSET or package.level > logging.INFO:
            package.setLevel(logging.INFO)

    def close(self) -> None:
        """End; without effect when it is not open."""
        if self._handler is not None:
            package = logging.getLogger("mulki")
            package.removeHandler(self._handler)
            package.setLevel(self._level)
            self._handler.close()
            self._handler = None


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Go on: a full disk would print a traceback for every line."""
