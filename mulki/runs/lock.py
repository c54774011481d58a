"""A lock on a run folder, so that one process alone writes to it."""

from __future__ import annotations

import os
import time
import weakref
from pathlib import Path

from mulki.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Who asks `is_locked` holds the lock for a moment.
_TRIES = 5
_PAUSE = 0.05  # seconds


class FolderLock:
    """The lock of this process on a folder, held while the object lives.

    It is an advisory lock of the operating system on the folder itself. So it leaves no file
    behind, and one of a process that has died is free again. On Windows, and on a file system that
    has no such locks, nothing is locked.

    Raises:
        InputError: another process, or another lock in this one, holds it.
    """

    def __init__(self, folder: Path):
        if fcntl is None:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if left:
                    time.sleep(_PAUSE)
                    continue
                os.close(descriptor)
                raise InputError(
                    f"{folder}: another run is writing to this folder; wait until it has ended, or "
                    "give another --name"
                ) from None
            except OSError:
                os.close(descriptor)
                return
        _descriptors.add(descriptor)
        self._release = weakref.finalize(self, _unlock, descriptor)

    def release(self) -> None:
        """Let others have it; without effect the second time."""
        release = getattr(self, "_release", None)
        if release is not None:
            release()


def is_locked(folder: Path) -> bool | None:
    """Whether a process has the lock of a folder; None where there are no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


_descriptors: set[int] = set()


def _unlock(descriptor: int) -> None:
    if descriptor in _descriptors:
        # Not by closing alone: a process forked at this moment still has it open.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        _descriptors.remove(descriptor)
        os.close(descriptor)


def _leave_to_parent() -> None:
    while _descriptors:
        os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    # A data loading process that outlives a killed run for some seconds must not hold its lock.
    os.register_at_fork(after_in_child=_leave_to_parent)
