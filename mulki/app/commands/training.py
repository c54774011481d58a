"""What every command that trains does to its process first."""

from __future__ import annotations

import logging
import sys
from typing import Any

from mulki.distributed.torchrun import is_first
from mulki.printing import PrintableFormatter


def prepare_process() -> None:
    """Keep freed memory for the next tensors, and print warnings on standard error."""
    from mulki.train.learning.memory import keep_freed_memory

    keep_freed_memory()
    # The level is the handler's: out.log takes more of the package's messages than the terminal.
    # Errors are left out here, since the command line prints the one that ends a run.
    handler = _Messages()
    # Of several processes only the first prints warnings.
    handler.setLevel(logging.WARNING if is_first() else logging.ERROR)
    handler.addFilter(lambda record: record.levelno < logging.ERROR)
    handler.addFilter(lambda record: not _printed_already(record.name))
    handler.setFormatter(PrintableFormatter("mulki: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("huggingface_hub.utils._http").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    # Each retry of the hub is two lines. One is enough, and a run that fails says why at its end.
    text = record.getMessage()
    if "Retrying in " in text:
        return "[Retry 1/" in text
    return " thrown while requesting " not in text


def _printed_already(logger: str) -> bool:
    # huggingface_hub has a handler of its own, and passes its messages on besides.
    package = logging.getLogger(logger.partition(".")[0])
    return package.name != "mulki" and any(
        type(handler) is logging.StreamHandler for handler in package.handlers
    )


class _Messages(logging.StreamHandler):
    @property
    def stream(self) -> Any:
        # Looked up anew for each message: the live display takes the place of standard error.
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass
