"""Run with `benchmarks/gpu.sh OUT`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.plan import PYTHON, TOTAL, csv_file, plan, variables
from benchmarks.gpu.probe import Machine
from benchmarks.gpu.steps import ROOT, Outcome, run_step, summary


def main(argv: list[str]) -> int:
    """Run the steps, and write their summary after each.

    Returns:
        The exit status: 1 if a step failed, 2 if nothing could be run.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for logs, CSV, figures and summary.txt")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all steps")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args(argv)
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    # Lines of an earlier run would be drawn with those of this one.
    csv_file(options.out).unlink(missing_ok=True)
    machine = _machine()
    if machine is None:
        return 2
    outcomes: list[Outcome] = []
    text = ""
    for step in plan(machine, options.out, options.seconds, options.rehearse):
        print(f"{step.name} ...", flush=True)
        left = options.seconds - (time.monotonic() - start)
        outcomes.append(run_step(step, options.out, left, variables(machine)))
        text = summary(outcomes, machine.device, time.monotonic() - start)
        (options.out / "summary.txt").write_text(text, encoding="utf-8")
    print(f"\n{text}", end="")
    return 1 if any(o.status == "failed" for o in outcomes) else 0


def _machine() -> Machine | None:
    command = [PYTHON, "-m", "benchmarks.gpu.probe"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    if done.returncode == 0:
        return Machine(**json.loads(done.stdout.splitlines()[-1]))
    print(done.stderr, file=sys.stderr)
    print("benchmarks/gpu.sh: torch and mulki must be importable; see above", file=sys.stderr)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
