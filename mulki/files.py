"""Writing files as a whole: a reader sees the old file or the new one, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write, which replaces ``path`` when the block ends.

    An error or an interrupt in the block leaves the old file as it was and removes the temporary
    one.
    """
    path = Path(path)
    # Not tempfile: it makes files that only their owner can read, and a renamed file keeps that.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # Without fsync, a power cut can leave an empty file under the new name.
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
