"""The steps of `benchmarks/gpu.sh`, the most important first, and their shares of the time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.probe import Machine
from benchmarks.gpu.steps import Commands, Step

PYTHON = sys.executable
TESTS = "tests/kernels/gpu"
NUMBERS = ("fp32", "tf32", "bf16", "fp16")
TOTAL = 410.0  # seconds; what has begun then has a minute more

# The most important first: a budget cuts off the end.
OPERATORS = (
    *("dual_teacher_kl", "prototype_cross_entropy", "contrastive", "siglip"),
    *("similarity", "teacher_kl_1", "teacher_kl_3"),
)
#: The search for the largest N leaves out what would be compiled or captured for every N.
SEARCHED = ("mulki", "eager", "liger", "cce", "memeff")

Run = Callable[[float], Commands]


def plan(machine: Machine, out: Path, total: float, rehearse: bool) -> list[Step]:
    """The steps in their order, those that cannot run here with the reason."""
    no_gpu = machine.no_gpu
    no_sanitizer = no_gpu
    if no_sanitizer is None and machine.sanitizer is None:
        no_sanitizer = "compute-sanitizer is neither on PATH nor in CUDA_HOME (CUDA toolkit)"
    no_suite = None if rehearse else no_gpu
    no_csv = f"nothing was measured: {no_suite}" if no_suite else None
    suite = _rehearsal(out) if rehearse else _throughput(out)
    steps: tuple[tuple[str, float, Run, str | None], ...] = (
        ("environment", 0.05, _environment, None),
        ("tests", 0.45, _tests, no_gpu),
        ("throughput", 0.40, suite, no_suite),
        ("memcheck", 0.10, _sanitized(machine, "memcheck"), no_sanitizer),
        ("largest", 0.10, _largest(out), no_gpu),
        ("racecheck", 0.10, _sanitized(machine, "racecheck"), no_sanitizer),
        ("tables", 0.05, _tables(out), no_csv),
        ("figures", 0.05, _figures(out), no_csv or machine.no_figures),
    )
    return [Step(name, share * total, run, skip) for name, share, run, skip in steps]


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
    of_numbers = [f"{TESTS}/test_gpu_{name}.py" for name in ("values", "schedules")]
    small = [PYTHON, "-m", "benchmarks.gpu.small", "--verify", "--seconds", f"{seconds:.0f}"]
    return {
        **{f"tests-{numbers}": [*pytest, *of_numbers, "-k", numbers] for numbers in NUMBERS},
        "tests-streams": [*pytest, f"{TESTS}/test_gpu_streams.py"],
        "tests-large": [*pytest, f"{TESTS}/test_gpu_large.py"],
        "tests-small": small,  # the sanitizer finds its kernels compiled
    }


def _bench(out: Path, *words: str) -> list[str]:
    return [PYTHON, "-m", "benchmarks.ops", "--output", str(csv_file(out)), *words]


def _throughput(out: Path) -> Run:
    words = ("--device", "cuda", "--modes", "forward", "both", "--seconds", "0.15")
    dtypes = ("--dtypes", "bfloat16", "float32")
    return lambda seconds: {
        "throughput": _bench(
            out, "--ops", *OPERATORS, *dtypes, *words, "--budget", f"{seconds:.0f}"
        )
    }


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
    words = ("--device", "cuda", "--largest", "--dtypes", "bfloat16", "--ops", *OPERATORS[:4])
    return lambda seconds: {
        "largest": _bench(out, *words, "--providers", *SEARCHED, "--budget", f"{seconds:.0f}")
    }


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
