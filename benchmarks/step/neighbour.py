"""Training beside another process that computes: how long OpenMP's threads spin while they wait.

    python -m benchmarks.step.neighbour --output benchmarks/step/neighbour.csv

A training step has many short parallel parts. At the end of each, GCC's OpenMP lets threads that
have nothing left to do spin GOMP_SPINCOUNT times before they sleep. With a core for each thread
that is fast; where another process takes a core, the spinning thread keeps the working one from
it. Each setting trains in a process of its own, alone and beside a process that counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks.tables import machine_line, parser_with_output, show

# As a process gets it: None is the library's own, 300,000 where threads have cores of their own.
COUNTS = (None, 0, 100, 1_000, 10_000, 100_000)
COLUMNS = {
    "spin_count": "GOMP_SPINCOUNT",
    "omp_threads": "threads",
    "alone": "images/s alone:.0f",
    "beside": "beside a busy process:.0f",
}
TRAINING = """
import json, logging, sys
from benchmarks.step import ours
from benchmarks.step.job import prepare
from benchmarks.step.stopwatch import Stopwatch
logging.getLogger("mulki").setLevel(logging.ERROR)
steps, batch = int(sys.argv[1]), 64
job = prepare(task="flags", captions=0, rounds=steps, lock_text=None, model="mulki-mini",
              batch_size=batch, limit_images=batch, augment="none", precision="fp32",
              device="cpu", workers=0, iterations=steps)
seconds = []
ours.learn(job, Stopwatch(job.device), lambda report, of_step: seconds.append(of_step))
print(json.dumps([batch / s for s in seconds[2:]]))
"""


def rate(count: int | None, threads: int, steps: int) -> float:
    """Images a second of a training step, the median of a new process."""
    settings = {"OMP_NUM_THREADS": str(threads)}
    if count is not None:
        settings["GOMP_SPINCOUNT"] = str(count)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(steps)],
        env=inherited | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return median(json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """A process that computes on one core while the context lasts."""
    process = subprocess.Popen([sys.executable, "-c", "while True: sum(range(1000))"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(counts: Sequence[int | None], steps: int, rounds: int) -> list[dict[str, object]]:
    """A row for each spin count with as many threads as cores, and one for a thread less."""
    cores = os.cpu_count() or 1
    settings = [(count, cores) for count in counts] + [(None, max(1, cores - 1))]
    alone: dict[tuple[int | None, int], list[float]] = {setting: [] for setting in settings}
    beside: dict[tuple[int | None, int], list[float]] = {setting: [] for setting in settings}
    for _ in range(rounds):
        for setting in settings:
            alone[setting].append(rate(*setting, steps))
            with busy_process():
                beside[setting].append(rate(*setting, steps))
    return [
        {
            "spin_count": "not set" if count is None else count,
            "omp_threads": threads,
            "alone": median(alone[count, threads]),
            "beside": median(beside[count, threads]),
        }
        for count, threads in settings
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument("--steps", type=int, default=25, help="of each training")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each kind, in turns")
    a = parser.parse_args(argv)
    print(machine_line("cpu"), flush=True)
    rows = measure(COUNTS, a.steps, a.rounds)
    show(rows, COLUMNS, a.output, "cpu")


if __name__ == "__main__":
    main()
