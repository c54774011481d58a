"""Tests and measures the Triton kernels on this machine's GPU, in under ten minutes.

    python -m benchmarks.gpu OUT                  # a folder, made where it is not there
    python -m benchmarks.gpu OUT --seconds 900

The steps, each a process of its own with a share of the time, and a log in OUT:

    tests     the kernels' tests on a GPU, then the conformance of every operator
    doctor    mulki doctor --kernels: where Triton is right and faster, as `auto` reads it
    times     mulki bench with Liger's and CCE's losses where they are installed: ops.csv
    largest   the largest batch that fits the memory: ops.csv

OUT/ops.csv has card, versions and commit in every line, and OUT/gpu.csv a line for each step. The
exit status is 1 if a step failed; one that ran out of time did not fail.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from mulki.kernels import lookup

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
TOTAL = 580.0  # seconds by default
GRACE = 15.0  # seconds that a step has to end after its time
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "mulki")
OPERATORS = ("dual_teacher_kl", "prototype_cross_entropy", "contrastive", "siglip", "similarity")
SHAPES = ("64x100x512", "1024x1201x768", "256x1000x512", "8192x8192x512", "4096x1000x768")
TEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
BENCH = (PYTHON, "-m", "benchmarks.ops", "--device", "cuda", "--dtypes", "bf16")


class Step(NamedTuple):
    """A command, and its share of the time that is left."""

    name: str
    share: float
    command: tuple[str, ...]


class Outcome(NamedTuple):
    """How a step ended."""

    name: str
    status: str  # "ok", "failed" or "out of time"
    seconds: float
    said: str  # the last line of its log


def steps(out: Path, seconds: float) -> Iterator[Step]:
    """The steps, the most important first."""
    table = str(out / "ops.csv")
    yield Step("tests", 0.35, (*TEST, "tests/kernels/gpu"))
    yield Step("conformance", 0.3, (*TEST, "-k", "triton-cuda", "tests/ops/test_conformance.py"))
    yield Step(
        "doctor", 0.4, (PYTHON, "-m", "mulki", "doctor", "--kernels", str(out / "wins.json"))
    )
    budget = ("--seconds", "0.2", "--budget", f"{0.25 * seconds:.0f}", "--output", table)
    yield Step("times", 0.7, (*BENCH, "--ops", *OPERATORS, "--shapes", *SHAPES, *budget))
    of_batch = ("--ops", *OPERATORS[:2], "--providers", "eager", "compile", "mulki")
    yield Step("largest", 1.0, (*BENCH, "--largest", *of_batch, "--output", table))


def run(step: Step, out: Path, seconds: float, deadline: float) -> Outcome:
    """Run a step for so long at most."""
    began, log = time.monotonic(), out / f"{step.name}.log"
    # Tests that have not begun by then are skipped.
    environment = {**os.environ, "MULKI_GPU_DEADLINE": str(time.time() + seconds)}
    if step.name in ("times", "largest"):
        environment["MULKI_BACKEND"] = "triton"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(min(seconds + GRACE, deadline)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return Outcome(step.name, status, time.monotonic() - began, lines[-1] if lines else "")


def machine() -> dict[str, str]:
    """The card and the versions."""
    found = {"card": torch.cuda.get_device_name(0), "driver": _driver(), "cuda": _cuda()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cuda() -> str:
    return str(torch.version.cuda or torch.version.hip)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; the exit status."""
    parser = argparse.ArgumentParser(description="tests and measures the Triton kernels on a GPU")
    parser.add_argument("out", type=Path, help="a folder for logs and tables")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all (default: 580)")
    given = parser.parse_args(arguments)
    if reason := lookup.why_not("teacher_kl", "cuda:0", torch.bfloat16):
        print(f"benchmarks.gpu: got no GPU for the kernels ({reason}); run it where one is")
        return 2
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end, of_machine, outcomes = time.monotonic() + given.seconds, machine(), []
    print(", ".join(f"{name} {value}" for name, value in of_machine.items()), flush=True)
    for step in steps(out, given.seconds):
        left = end - time.monotonic()
        if left < GRACE:
            outcomes.append(Outcome(step.name, "out of time", 0.0, "did not begin"))
            continue
        outcomes.append(run(step, out, step.share * (left - GRACE), left))
        print(f"{step.name}: {outcomes[-1].status}, {outcomes[-1].said}", flush=True)
    with (out / "gpu.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Outcome._fields, *of_machine])
        writer.writerows([*one, *of_machine.values()] for one in outcomes)
    return int(any(one.status == "failed" for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
