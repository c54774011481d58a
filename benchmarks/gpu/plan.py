"""The steps of `benchmarks/gpu.sh`, the most important first, and their shares of the time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.probe import Machine
from benchmarks.gpu.steps import Commands, Step

Options = dict[str, tuple[str, ...]]  # of the operator benchmark

PYTHON = sys.executable
TESTS = "tests/kernels/gpu"
INTERPRETED = "tests/kernels/interpreted"
NUMBERS = ("fp32", "tf32", "bf16", "fp16")
TOTAL = 520.0  # seconds; what has begun then has a minute more

KEPT = 0.03  # of it, for tables and figures of what was measured

#: What is timed first: what serves unasked, what `mulki doctor --kernels` decides about, what
#: others have, and the least that it takes.
PROVIDERS = (
    "compile",  # first, since it makes torch forget what others have compiled
    "mulki-chunked",
    "mulki-chunked-compiled",
    "mulki-reference",
    "mulki",
    "eager",
    "products",
)
#: By step, the options of the suite that is timed in it. A budget cuts off the last shapes.
SUITES: dict[str, Options] = {
    "throughput": {
        "--ops": ("dual_teacher_kl",),
        "--dtypes": ("bfloat16",),
        "--providers": PROVIDERS,
    },
    "losses": {
        "--ops": ("prototype_cross_entropy", "contrastive", "pair_kl", "siglip", "similarity"),
        "--dtypes": ("bfloat16",),
        "--providers": PROVIDERS,
    },
    # By all that there is, CUDA graphs and other packages too.
    "more": {
        "--ops": ("dual_teacher_kl", "teacher_kl_1", "teacher_kl_3"),
        "--dtypes": ("bfloat16", "float32"),
    },
}
#: The search for the largest N leaves out what would be compiled or captured for every N.
SEARCHED: Options = {
    "--device": ("cuda",),
    "--ops": ("dual_teacher_kl", "prototype_cross_entropy", "contrastive", "siglip"),
    "--dtypes": ("bfloat16",),
    "--providers": ("mulki", "eager", "liger", "cce", "memeff"),
}
#: A rehearsal is so small that it measures nothing.
TINY: Options = {
    "--device": ("cpu",),
    "--modes": ("both",),
    "--seconds": ("0.001",),
    "--shapes": ("12x12x16",),
    "--providers": ("eager", "graph", "compile-graph", "products", "torch_lce", "mulki"),
}
TINY_SEARCH: Options = {
    "--device": ("cpu",),
    "--limit": ("1024",),
    "--ops": ("siglip",),
    "--dtypes": ("bfloat16",),
    "--providers": ("mulki", "eager"),
}
TINY_SHAPE = "9x7x16"


@dataclass(frozen=True)
class Plan:
    """What is run on a machine."""

    machine: Machine
    out: Path  # for logs, CSV and figures

    def steps(self, total: float) -> list[Step]:
        """The steps in their order, those that cannot run here with the reason."""
        machine = self.machine
        no_gpu = machine.no_gpu
        no_sanitizer = no_gpu
        if no_gpu is None and machine.sanitizer is None and not machine.rehearsal:
            no_sanitizer = "compute-sanitizer is neither on PATH nor in CUDA_HOME (CUDA toolkit)"
        no_suite = None if machine.rehearsal else no_gpu
        no_csv = f"nothing was measured: {no_suite}" if no_suite else None
        steps: tuple[tuple[str, float, Callable[[float], Commands], str | None], ...] = (
            ("environment", 0.03, self._environment, None),
            ("verified", 0.12, self._verified, no_suite),
            ("throughput", 0.18, self._timed("throughput"), no_suite),
            ("losses", 0.12, self._timed("losses"), no_suite),
            ("proof", 0.15, self._proof, no_gpu),
            ("schedules", 0.15, self._schedules, no_gpu),
            ("tests", 0.20, self._tests, no_gpu),
            ("memcheck", 0.08, self._sanitized("memcheck"), no_sanitizer),
            ("racecheck", 0.07, self._sanitized("racecheck"), no_sanitizer),
            ("consan", 0.05, self._instrumented("consan"), no_gpu or self._unknown("consan")),
            ("fpsan", 0.05, self._instrumented("fpsan"), no_gpu or self._unknown("fpsan")),
            ("largest", 0.07, self._largest, no_suite),
            ("more", 1.00, self._timed("more"), no_suite),
            ("tables", KEPT, self._tables, no_csv),
            ("figures", KEPT, self._figures, no_csv or machine.no_figures),
        )
        return [
            Step(name, share * total, run, skip, 0.0 if share == KEPT else 2 * KEPT * total)
            for name, share, run, skip in steps
        ]

    @property
    def variables(self) -> dict[str, str]:
        """Environment of the commands: the kernels have to be asked for, and nobody stands in."""
        if self.machine.rehearsal:
            # A GPU that is here all the same is not touched, and the user's files are kept.
            return {"CUDA_VISIBLE_DEVICES": "", "MULKI_CACHE_DIR": str(self.out / "cache")}
        return {} if self.machine.no_gpu else {"MULKI_BACKEND": "triton", "MULKI_STRICT": "1"}

    @property
    def csv_file(self) -> Path:
        """What the suite writes and the figures are drawn from."""
        return self.out / "ops.csv"

    def _environment(self, seconds: float) -> Commands:
        return {"environment": [PYTHON, "-m", "mulki.info"]}

    def _verified(self, seconds: float) -> Commands:
        # Once, side by side: this finds what is wrong, and leaves compiled what is timed next.
        names = ("throughput", "losses")
        return _sharing({f"verified-{name}": self._suite(name, seconds, "1e-3") for name in names})

    def _schedules(self, seconds: float) -> Commands:
        counts = ["tests/kernels/test_schedule.py", "tests/benchmarks/test_plan.py"]
        commands = {"schedules-plan": _pytest(*counts), **self._tests_of_numbers("schedules")}
        if self.machine.rehearsal:
            # The table itself is compared with today's counts in the tests of the benchmark.
            commands["schedules-plan"] += ["-k", "not todays and not printed"]
            chosen = _pytest(f"{INTERPRETED}/test_triton_schedules.py", "-k", "half and kl_weights")
            commands["schedules-interpreted"] = [*_interpreter(), *chosen]
        return _sharing(commands)

    def _tests(self, seconds: float) -> Commands:
        # Most of the time Triton compiles, on one core for each process.
        commands = {
            **self._tests_of_numbers("values"),
            "tests-streams": _pytest(f"{TESTS}/test_gpu_streams.py"),
            "tests-large": _pytest(f"{TESTS}/test_gpu_large.py"),
            # Leaves compiled what is sanitized later.
            "tests-small": [*self._small(seconds), "--verify"],
        }
        if self.machine.rehearsal:
            chosen = _pytest(f"{INTERPRETED}/test_triton_public.py")
            commands["tests-interpreted"] = [*_interpreter(), *chosen]
        return _sharing(commands)

    def _tests_of_numbers(self, name: str) -> dict[str, list[str]]:
        # Without a GPU the tests say so; a rehearsal shows that they are there.
        numbers = NUMBERS[2:3] if self.machine.rehearsal else NUMBERS
        return {f"{name}-{n}": _pytest(f"{TESTS}/test_gpu_{name}.py", "-k", n) for n in numbers}

    def _suite(self, name: str, budget: float, seconds: str) -> list[str]:
        real: Options = {"--device": ("cuda",), "--modes": ("forward", "both")}
        real["--seconds"] = (seconds,)
        return _bench(SUITES[name] | (TINY if self.machine.rehearsal else real), budget)

    def _timed(self, name: str) -> Callable[[float], Commands]:
        output = ("--output", str(self.csv_file))
        return lambda seconds: {name: [*self._suite(name, seconds, "0.15"), *output]}

    def _largest(self, seconds: float) -> Commands:
        options = TINY_SEARCH if self.machine.rehearsal else SEARCHED
        output = ("--output", str(self.csv_file))
        return {"largest": [*_bench(options, seconds), "--largest", *output]}

    def _small(self, seconds: float) -> list[str]:
        small = [PYTHON, "-m", "benchmarks.gpu.small", "--seconds", f"{seconds:.0f}"]
        if not self.machine.rehearsal:
            return small
        return [*_interpreter(), *small, "--device", "cpu", "--shapes", TINY_SHAPE]

    def _sanitized(self, tool: str) -> Callable[[float], Commands]:
        # Without torch's cache every tensor is an allocation of its own, and has edges to be
        # noticed. Without a limit on what is printed nothing hides behind the false alarms.
        options = ("--tool", tool, "--error-exitcode", "9", "--print-limit", "0")
        alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        sanitizer = [str(self.machine.sanitizer)]
        if self.machine.rehearsal:
            sanitizer = [PYTHON, "-m", "benchmarks.gpu.rehearsal", "sanitizer"]
        return lambda seconds: {tool: [*alone, *sanitizer, *options, *self._small(seconds)]}

    def _instrumented(self, mode: str) -> Callable[[float], Commands]:
        # Triton's own: "consan" stops where shared memory was not waited for, "fpsan" computes with
        # integers, whose sums are the same in any order.
        instrumented = ["env", f"TRITON_INSTRUMENTATION_MODE={mode}"]
        return lambda seconds: {mode: [*instrumented, *self._small(seconds), "--again"]}

    def _unknown(self, mode: str) -> str | None:
        if self.machine.rehearsal or mode in self.machine.instrumented:
            return None
        return f"this Triton has no instrumentation {mode!r} for this GPU: nothing would be checked"

    def _proof(self, seconds: float) -> Commands:
        doctor = [PYTHON, "-m", "mulki", "doctor", "--kernels"]
        return {"proof": [*_interpreter(), *doctor] if self.machine.rehearsal else doctor}

    def _tables(self, seconds: float) -> Commands:
        return {"tables": [PYTHON, "-m", "benchmarks.ops", "table", str(self.csv_file)]}

    def _figures(self, seconds: float) -> Commands:
        words = ("plot", str(self.csv_file), str(self.out / "figures"))
        return {"figures": [PYTHON, "-m", "benchmarks.ops", *words]}


def _bench(options: Options, budget: float) -> list[str]:
    words = [word for option, values in options.items() for word in (option, *values)]
    return [PYTHON, "-m", "benchmarks.ops", *words, "--budget", f"{budget:.0f}"]


def _pytest(*words: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]


def _interpreter() -> list[str]:
    return ["env", "TRITON_INTERPRET=1", "MULKI_BACKEND=triton", "MULKI_STRICT=1"]


def _sharing(commands: dict[str, list[str]]) -> Commands:
    """The same commands, which share the cores."""
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    shared = ["env", f"OMP_NUM_THREADS={threads}"]
    return {name: [*shared, *command] for name, command in commands.items()}
