"""The steps of `benchmarks/gpu.sh`, the most important first, and their shares of the time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.probe import Machine
from benchmarks.gpu.steps import Commands, Step

PYTHON = sys.executable
TESTS = "tests/kernels/gpu"
NUMBERS = ("fp32", "tf32", "bf16", "fp16")
TOTAL = 410.0  # seconds; what has begun then has a minute more

KEPT = 0.05  # of it, for tables and figures of what was measured

#: By step, the options of the suite that is timed in it. A budget cuts off the last shapes.
SUITES = {
    "throughput": ("--ops", "dual_teacher_kl", "--dtypes", "bfloat16"),
    "losses": (
        *("--ops", "prototype_cross_entropy", "contrastive", "siglip", "similarity"),
        *("--dtypes", "bfloat16"),
    ),
    "more": ("--ops", "dual_teacher_kl", "teacher_kl_1", "teacher_kl_3", "--dtypes", "float32"),
}
#: The search for the largest N leaves out what would be compiled or captured for every N.
SEARCHED = (
    *("--ops", "dual_teacher_kl", "prototype_cross_entropy", "contrastive", "siglip"),
    *("--dtypes", "bfloat16", "--providers", "mulki", "eager", "liger", "cce", "memeff"),
)

Run = Callable[[float], Commands]


def plan(machine: Machine, out: Path, total: float, rehearse: bool) -> list[Step]:
    """The steps in their order, those that cannot run here with the reason."""
    no_gpu = machine.no_gpu
    no_sanitizer = no_gpu
    if no_sanitizer is None and machine.sanitizer is None:
        no_sanitizer = "compute-sanitizer is neither on PATH nor in CUDA_HOME (CUDA toolkit)"
    no_suite = None if rehearse else no_gpu
    no_csv = f"nothing was measured: {no_suite}" if no_suite else None
    suite = _rehearsal(out) if rehearse else _throughput(out, "throughput")
    steps: tuple[tuple[str, float, Run, str | None], ...] = (
        ("environment", 0.05, _environment, None),
        ("tests", 0.42, _tests, no_gpu),
        ("throughput", 0.20, suite, no_suite),
        ("losses", 0.16, _throughput(out, "losses"), no_gpu),
        ("memcheck", 0.08, _sanitized(machine, "memcheck"), no_sanitizer),
        ("largest", 0.08, _largest(out), no_gpu),
        ("racecheck", 0.08, _sanitized(machine, "racecheck"), no_sanitizer),
        ("more", 1.00, _throughput(out, "more"), no_gpu),
        ("tables", KEPT, _tables(out), no_csv),
        ("figures", KEPT, _figures(out), no_csv or machine.no_figures),
    )
    return [
        Step(name, share * total, run, skip, 0.0 if share == KEPT else KEPT * total)
        for name, share, run, skip in steps
    ]


def variables(machine: Machine) -> dict[str, str]:
    """Environment of the commands: the kernels have to be asked for, and nobody stands in."""
    return {} if machine.no_gpu else {"MULKI_BACKEND": "triton", "MULKI_STRICT": "1"}


def csv_file(out: Path) -> Path:
    """What the suite writes and the figures are drawn from."""
    return out / "ops.csv"


def _environment(seconds: float) -> Commands:
    return {"environment": [PYTHON, "-m", "mulki.info"]}


def _tests(seconds: float) -> Commands:
    # Most of the time Triton compiles, on one core for each process.
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    of_numbers = [f"{TESTS}/test_gpu_{name}.py" for name in ("schedules", "values")]
    small = [PYTHON, "-m", "benchmarks.gpu.small", "--verify", "--seconds", f"{seconds:.0f}"]
    commands = {
        **{f"tests-{numbers}": [*pytest, *of_numbers, "-k", numbers] for numbers in NUMBERS},
        "tests-streams": [*pytest, f"{TESTS}/test_gpu_streams.py"],
        "tests-large": [*pytest, f"{TESTS}/test_gpu_large.py"],
        # These find what is wrong, and leave compiled what is timed and sanitized later.
        "tests-small": small,
        **{f"tests-{name}": _suite(name, seconds, "1e-3") for name in ("throughput", "losses")},
    }
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    shared = ["env", f"OMP_NUM_THREADS={threads}"]
    return {name: [*shared, *command] for name, command in commands.items()}


def _bench(out: Path, *words: str) -> list[str]:
    return [PYTHON, "-m", "benchmarks.ops", "--output", str(csv_file(out)), *words]


def _suite(name: str, budget: float, seconds: str) -> list[str]:
    words = ("--device", "cuda", "--modes", "forward", "both", "--seconds", seconds)
    bench = [PYTHON, "-m", "benchmarks.ops"]
    return [*bench, *SUITES[name], *words, "--budget", f"{budget:.0f}"]


def _throughput(out: Path, name: str) -> Run:
    output = ("--output", str(csv_file(out)))
    return lambda seconds: {name: [*_suite(name, seconds, "0.15"), *output]}


def _rehearsal(out: Path) -> Run:
    """The same on the CPU, so small that it measures nothing."""
    words = ("--modes", "both", "--seconds", "0.001", "--shapes", "12x12x16")
    providers = ("--providers", "eager", "mulki", "graph")
    return lambda seconds: {
        "throughput": _bench(
            out, *words, *providers, "--dtypes", "bfloat16", "--budget", f"{seconds:.0f}"
        )
    }


def _largest(out: Path) -> Run:
    words = ("--device", "cuda", "--largest", *SEARCHED)
    return lambda seconds: {"largest": _bench(out, *words, "--budget", f"{seconds:.0f}")}


def _sanitized(machine: Machine, tool: str) -> Run:
    # Without torch's cache every tensor is an allocation of its own, and has edges to be noticed.
    sanitizer = [str(machine.sanitizer), "--tool", tool, "--error-exitcode", "9"]
    small = [PYTHON, "-m", "benchmarks.gpu.small"]
    alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    return lambda seconds: {tool: [*alone, *sanitizer, *small, "--seconds", f"{seconds:.0f}"]}


def _tables(out: Path) -> Run:
    return lambda seconds: {"tables": [PYTHON, "-m", "benchmarks.ops", "table", str(csv_file(out))]}


def _figures(out: Path) -> Run:
    words = ("plot", str(csv_file(out)), str(out / "figures"))
    return lambda seconds: {"figures": [PYTHON, "-m", "benchmarks.ops", *words]}
