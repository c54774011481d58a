"""What torchrun says of this process. Reading results asks it too, without torch."""

from __future__ import annotations

import os
import platform


def is_first() -> bool:
    """Whether this process is the one of several that writes and prints, or the only one."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def launcher() -> str | None:
    """The torchrun of this machine that started this process, the same after a restart."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"torchrun {run} {os.getppid()} on {platform.node()}"
