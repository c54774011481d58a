"""Compile every variant of the Triton kernels without a GPU, and report its registers and memory.

python -m benchmarks.kernels                 # compiled.csv and RESULTS.md beside this file
python -m benchmarks.kernels --output OUT --processes 8    # oldest/ is made with the oldest Triton
python -m benchmarks.kernels plan            # counts of products, launches and memory; see `plan`
python -m benchmarks.kernels host            # what chunks and steps cost the host; see `host`

Takes about ten minutes of one core. Variants that were compiled before come from Triton's cache
(TRITON_CACHE_DIR), so a run that was stopped goes on where it was. Ends with status 1, and names
the variants, where a limit of `limits.py` is broken.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.kernels.compiled import compile_all
from benchmarks.kernels.host import main as host
from benchmarks.kernels.limits import violations
from benchmarks.kernels.plan import main as plan
from benchmarks.kernels.report import ARCHITECTURES, HERE, all_variants, compilers, render, write


def main() -> int:
    if sys.argv[1:2] == ["plan"]:
        return plan(sys.argv[2:])
    if sys.argv[1:] == ["host"]:
        return host()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the report")
    parser.add_argument("--processes", type=int, help="compilers at a time (default: all cores)")
    options = parser.parse_args()
    rows = compile_all(all_variants(), processes=options.processes)
    options.output.mkdir(parents=True, exist_ok=True)
    write(rows, options.output / "compiled.csv")
    (options.output / "RESULTS.md").write_text(render(rows, compilers()))
    broken = {row.name: violations(row) for row in rows if violations(row)}
    for name, problems in broken.items():
        print(f"{name}: {'; '.join(problems)}", file=sys.stderr)
    print(f"{len(rows)} variants on {', '.join(ARCHITECTURES)}: {options.output}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
