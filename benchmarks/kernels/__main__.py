"""Compile every Triton kernel and tile ahead of time, without a GPU, and note what it takes.

python -m benchmarks.kernels                 # compiled.csv and RESULTS.md beside this file
python -m benchmarks.kernels --output OUT --processes 8

Takes about half an hour of one core; what has not changed since comes from Triton's cache. Names
the entries that do not keep a limit of `limits.py`, and then ends with status 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.kernels.compiled import compile_all
from benchmarks.kernels.limits import violations
from benchmarks.kernels.report import ARCHITECTURES, HERE, compilers, listed, render, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the report")
    parser.add_argument("--processes", type=int, help="compilers at a time (default: all cores)")
    options = parser.parse_args()
    rows = compile_all(listed(), full=True, processes=options.processes)
    options.output.mkdir(parents=True, exist_ok=True)
    write(rows, options.output / "compiled.csv")
    (options.output / "RESULTS.md").write_text(render(rows, compilers()))
    broken = {row.name: violations(row) for row in rows if violations(row)}
    for name, told in broken.items():
        print(f"{name}: {'; '.join(told)}", file=sys.stderr)
    print(f"{len(rows)} entries on {', '.join(ARCHITECTURES)}: {options.output}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
