"""Which torchrun started this process. Reading results asks it too, without torch."""

from __future__ import annotations

import os
import platform


def launcher() -> str | None:
    """The torchrun of this machine that started this process, the same after a restart."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"torchrun {run} {os.getppid()} on {platform.node()}"
