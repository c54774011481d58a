"""Writing files so that no reader, and no interrupt, ever meets half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write, which takes the place of ``path`` when the block ends.

    A reader sees the old file or the new one. An error or an interrupt in the block leaves the old
    file as it was and nothing beside it.
    """
    path = Path(path)
    # Not tempfile: its files are private to the user, and this one keeps its mode when renamed.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # Without it a power cut can leave the new name on an empty file.
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8), see `replacing`.

    Raises:
        OSError: as ``open`` does.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")
