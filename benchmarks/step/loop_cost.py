"""Both loops in turns: losses checked, memory taken, steps timed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from benchmarks.step.job import Job
from benchmarks.step.ours import learn, watched_optimizer
from benchmarks.step.plain import PlainLoop
from benchmarks.step.stopwatch import PARTS, Stopwatch
from benchmarks.tables import Cell
from mulki.bench.call_cost import PeakMemory, no_garbage_collection
from mulki.errors import InputError
from mulki.train.learning.inputs import StepReport

MIB = 2**20
# Relative difference of the losses of the first step: they differ in the order of sums in fp32, and
# in half precision in what is rounded too.
TOLERANCE = {"fp32": 1e-4}
TOLERANCE_HALF = 2e-2


@dataclass
class Tally:
    """Of one loop."""

    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    growth: int | None = None

    def row(self, images: int) -> dict[str, Cell]:
        """Medians: images per second, milliseconds, the growth of memory, and the parts' shares."""
        median = float(np.median(self.seconds))
        of_parts = {name: float(np.median([p[name] for p in self.parts])) for name in PARTS}
        total = sum(of_parts.values())
        return {
            "images_per_second": images / median,
            "ms": 1e3 * median,
            "growth_mib": None if self.growth is None else self.growth / MIB,
            **{f"{name}_share": of_part / total for name, of_part in of_parts.items()},
        }


def compare(job: Job, rounds: int) -> list[dict[str, Cell]]:
    """A row for each loop; the second has the ratios.

    Args:
        rounds: as `prepare` got them.

    Raises:
        InputError: the losses of the first step differ.
    """
    plain_watch, our_watch = Stopwatch(job.device), Stopwatch(job.device)
    plain, ours = Tally(), Tally()
    loop = PlainLoop(job, plain_watch)
    warm_up = job.warm_up
    peak: list[PeakMemory] = []
    once: list[float] = []

    def listen(report: StepReport, seconds: float) -> None:
        first, remembering = report.step == 1, report.step == warm_up
        if first:
            once.append(seconds)
        if peak:
            ours.growth = peak.pop().growth()
        plain_peak = PeakMemory(str(job.device)) if remembering else None
        plain_watch.start()
        with watched_optimizer(plain_watch):
            loss = loop.step()
        took = plain_watch.stop()
        if plain_peak is not None:
            plain.growth = plain_peak.growth()
        if first:
            _check(sum(report.losses.values()), loss, job)
        round_ = report.step - warm_up
        if round_ >= 1:
            exact = plain_watch.exact
            if not exact or job.device.type == "cpu":
                plain.seconds.append(took)
                ours.seconds.append(seconds)
            if exact:
                plain.parts.append(plain_watch.parts)
                ours.parts.append(our_watch.parts)
        if job.device.type != "cpu":
            plain_watch.exact = our_watch.exact = not 0 <= round_ < rounds
        if report.step == warm_up - 1:
            peak.append(PeakMemory(str(job.device)))

    with no_garbage_collection():
        learn(job, our_watch, listen)
    ratio = float(np.median(np.divide(plain.seconds, ours.seconds)))
    once_s = once[0] - float(np.median(ours.seconds))
    images = min(job.config.batch_size, len(job.task.train))
    return [
        {"loop": "plain", **plain.row(images), "speedup": None, "once_s": None},
        {"loop": "mulki", **ours.row(images), "speedup": ratio, "once_s": once_s},
    ]


def _check(ours: float, plain: float, job: Job) -> None:
    allowed = TOLERANCE.get(job.config.precision, TOLERANCE_HALF)
    print(f"loss of the first step: {ours:.6f} (mulki), {plain:.6f} (plain)", flush=True)
    if not math.isclose(ours, plain, rel_tol=allowed):
        raise InputError(
            f"the losses of the first step differ: {ours:.6f} and {plain:.6f}, allowed a relative "
            f"difference of {allowed:g}"
        )
