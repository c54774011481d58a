"""`mulki prove` as a step: it ends in time, and its proof is kept with the results.

python -m benchmarks.gpu.proof proof.json --seconds 20 --limit 60

The proof also stays in the cache of mulki, so that from then on the kernels serve where they were
right and faster.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mulki.app.prove import report


def main(argv: list[str]) -> int:
    """Prove, and copy the proof after each verdict: a step that takes too long is killed.

    Returns:
        The exit status: 1 if a kernel is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="where the proof is copied to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="for timing")
    parser.add_argument("--limit", type=float, required=True, help="seconds for all of it")
    options = parser.parse_args(argv)
    return report(options.device, options.seconds, options.limit, options.file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
