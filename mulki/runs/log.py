"""``out.log`` of a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from mulki.printing import PrintableFormatter


@contextlib.contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Write what the package ``mulki`` logs, debugging apart, into a file meanwhile."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("mulki")
    package.addHandler(handler)
    # Without a level of its own, the package has that of the root logger, WARNING, and the
    # progress would not reach the file.
    level = package.level
    if level == logging.NOTSET or level > logging.INFO:
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Go on: a full disk would print a traceback for every line."""
