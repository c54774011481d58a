"""Try random cases for a given time, and show the smallest one that fails.

    python -m tests.fuzz operators                          # values and gradients against float64
    python -m tests.fuzz calls                              # one argument that is wrong or extreme
    python -m tests.fuzz files                              # every reader of files from elsewhere
    python -m tests.fuzz kernels                            # Triton kernels, in its interpreter
    python -m tests.fuzz operators --seconds 600 --seed 7   # a seed always gives the same cases

The last line says how many cases were tried, and the seed. Where one failed, the command that tries
the same cases again is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
from collections.abc import Sequence

from tests.fuzz.batches import BATCH, try_for

TARGETS = ("operators", "calls", "files", "kernels")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and try; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long new cases are drawn")
    parser.add_argument("--seed", type=int, help="of the cases; a fresh one by default")
    given = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    again = f"python -m tests.fuzz {given.target} --seconds {given.seconds:g} --seed {seed}"
    print(again, flush=True)
    if given.target == "kernels":
        # Before Triton is imported; it holds for the whole process.
        os.environ["TRITON_INTERPRET"] = "1"
        if importlib.util.find_spec("triton") is None:
            print("kernels: left out, for Triton is not installed")
            return 0
    tried = importlib.import_module(f"tests.fuzz.{given.target}")
    try:
        count = try_for(tried.tries, given.seconds, seed, getattr(tried, "BATCH", BATCH))
    except Exception as error:
        print(
            f"{given.target}: a case fails; the same cases again, on a slower machine with more "
            f"seconds:\n{again}",
            file=sys.stderr,
        )
        raise error
    print(f"{given.target}: {count} cases passed, seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
