"""Try random cases for a given time, and show the smallest one that fails.

    python -m tests.fuzz operators                          # values and gradients against float64
    python -m tests.fuzz files                              # every reader of files from elsewhere
    python -m tests.fuzz operators --seconds 600 --seed 7   # a seed always gives the same cases

The last line says how many cases were tried, and the seed. The exit status is 1 where one failed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from tests.fuzz import files, operators
from tests.fuzz.batches import try_for

TARGETS = {"operators": operators.tries, "files": files.tries}


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
    print(f"{given.target}: seed {seed}", flush=True)
    try:
        count = try_for(TARGETS[given.target], given.seconds, seed)
    except Exception as error:
        print(f"{given.target}: a case fails; --seed {seed} finds it again", file=sys.stderr)
        raise error
    print(f"{given.target}: {count} cases passed, seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
