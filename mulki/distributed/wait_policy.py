"""How long the threads of a CPU operation wait for each other before they sleep, for `mulki run`.

A training step has many short parallel parts. GCC's OpenMP, which torch brings on Linux, lets
threads that wait spin for a millisecond and more. Where another process takes one of the cores, the
spinning thread keeps the working one from it: benchmarks/step/neighbour.csv has what it costs.
OpenMP reads its settings when torch is imported, and no later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise

#: Rounds of spinning, a few microseconds: about what waking a thread takes.
SPIN_COUNT = "1000"

# What a user may have decided with.
_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def set_for_run() -> None:
    """Set GOMP_SPINCOUNT if this process trains by a command of ours and the user set nothing."""
    if _trains(sys.orig_argv) and not any(name in os.environ for name in _SETTINGS):
        os.environ.update(GOMP_SPINCOUNT=SPIN_COUNT)


def _trains(command: Sequence[str]) -> bool:
    # As `mulki run`, or as `python -m mulki run`; the interpreter may have options of its own. A
    # plan measures the steps of a run.
    for first, second in pairwise(command):
        if os.path.splitext(os.path.basename(first))[0] == "mulki":
            return second in ("run", "plan", "reproduce")
    return False
