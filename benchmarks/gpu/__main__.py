"""Run with `benchmarks/gpu.sh OUT`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.plan import PYTHON, TOTAL, Plan
from benchmarks.gpu.probe import Machine
from benchmarks.gpu.steps import ROOT, Outcome, run_step, summary

#: What is handed back, by what it is called among the logs; few files, as some machines send few.
RESULTS = {"summary.txt": "summary.txt", "ops.csv": "ops.csv", "tables.md": "tables.log"}
ARCHIVE = "results.tar.gz"


def main(argv: list[str]) -> int:
    """Run the steps, and write their summary and all else after each.

    Returns:
        The exit status: 1 if a step failed, 2 if nothing could be run.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for the summary, the CSV and an archive")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all steps")
    parser.add_argument(
        "--rehearse", action="store_true", help="every step without a GPU, tiny: measures nothing"
    )
    options = parser.parse_args(argv)
    start = time.monotonic()
    machine = _machine(options.rehearse)
    if machine is None:
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for name in (*RESULTS, ARCHIVE):
        (options.out / name).unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    text = ""
    with tempfile.TemporaryDirectory(prefix="mulki-gpu-") as folder:
        logs = Path(folder)
        plan = Plan(machine, logs)
        for step in plan.steps(options.seconds):
            print(f"{step.name} ...", flush=True)
            left = options.seconds - (time.monotonic() - start)
            outcomes.append(run_step(step, logs, left, plan.variables))
            text = summary(outcomes, machine.device, time.monotonic() - start)
            (logs / "summary.txt").write_text(text, encoding="utf-8")
            _hand_back(logs, options.out)
    print(f"\n{text}", end="")
    return 1 if any(o.status == "failed" for o in outcomes) else 0


def _machine(rehearse: bool) -> Machine | None:
    command = [PYTHON, "-m", "benchmarks.gpu.probe", *(["--rehearse"] if rehearse else [])]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    if done.returncode == 0:
        return Machine(**json.loads(done.stdout.splitlines()[-1]))
    print(done.stderr, file=sys.stderr)
    print("benchmarks/gpu.sh: torch and mulki must be importable; see above", file=sys.stderr)
    return None


def _hand_back(logs: Path, out: Path) -> None:
    """Copy the results to `out`, and all that there is into the archive."""
    for name, source in RESULTS.items():
        if (logs / source).is_file():
            shutil.copyfile(logs / source, out / name)
    part = out / f".{ARCHIVE}"
    with tarfile.open(part, "w:gz") as archive:
        archive.add(logs, arcname="results")
    part.replace(out / ARCHIVE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
