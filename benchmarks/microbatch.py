"""Memory and time of a training step whose batch is encoded in micro-batches.

    python -m benchmarks.microbatch
    python -m benchmarks.microbatch --models ViT-S-32 --micro-batch 4 --factors 1 16

A step is that of the whole objective of MulKI. Memory is measured in a fresh process per point,
time in one process in which the points take turns. microbatch/RESULTS.md says what is counted.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.saved import SavedBytes
from benchmarks.tables import Cell, Row, machine_line, parser_with_output, show
from mulki.bench.call_cost import PeakMemory, no_garbage_collection, take_turns
from mulki.clip import models
from mulki.clip.features import Features
from mulki.errors import InputError
from mulki.losses import MulKILoss
from mulki.train.config.precision import Name, Precision
from mulki.train.learning.memory import free_memory
from mulki.train.microbatch import Encoder, backward

MIB = 2**20
CLASSES = 32
# Relative L2 distance of a gradient from the whole batch's that rounding explains: matrix products
# of other sizes add up in another order.
TOLERANCE = {"fp32": 1e-4}
TOLERANCE_HALF = 3e-2
# Larger batches are timed once, and not tried whole.
MOST_TIMED = 16
# Freed blocks go back to the system at once, so that what the process holds is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Point = tuple[int, int | None]  # B, and the micro-batch if it is not the whole batch


@dataclass(frozen=True)
class Setting:
    """Of all points of a run.

    Args:
        model: an open_clip model, with random weights, or mulki-mini.
        precision: as `mulki run` names it.
        device: where it runs.
        threads: on the CPU; 0 for those torch takes.
    """

    model: str
    precision: Name
    device: str
    threads: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Images, their classes and what the teachers say of them."""

    images: Tensor
    target: Tensor
    teachers: tuple[Features, ...]

    def tensors(self) -> list[Tensor]:
        """Those with a row per image."""
        return [self.images, self.target, *(t.images for t in self.teachers)]

    def head(self, size: int) -> Batch:
        """Its first images."""
        teachers = tuple(replace(t, images=t.images[:size]) for t in self.teachers)
        return Batch(self.images[:size], self.target[:size], teachers)

    def bytes(self) -> int:
        """Of images, classes and teachers' features."""
        return sum(t.nbytes for t in self.tensors())


class Workload:
    """A student whose text tower is locked, two teachers whose features are known, random images.

    The text tower is locked so that nothing but the image tower keeps activations: what it keeps
    does not depend on the batch and would make a growth look smaller.
    """

    def __init__(self, setting: Setting) -> None:
        if setting.threads:
            torch.set_num_threads(setting.threads)
        torch.manual_seed(0)
        device = torch.device(setting.device)
        self.model = models.load(setting.model, device=device)
        self.model.lock(text=True)
        self.precision = Precision(setting.precision, device)
        self.precision.convert(self.model)
        self.model.train()
        self._texts = self.model.text_inputs([f"a picture of thing {i}." for i in range(CLASSES)])
        with torch.no_grad():
            self._width = self.model.encode_texts(self._texts).shape[1]
        self._constants = [self._unit(CLASSES) for _ in range(5)]
        self._loss = MulKILoss(gate="label")
        self.weights = [*self.model.trainable().values()]
        # A step must not move the weights far: sizes are compared at the same ones.
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-7, fused=device.type != "mps")

    def _unit(self, rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, self._width, device=self.model.device), dim=1)

    def batch(self, size: int) -> Batch:
        """A batch of that many images, in the host's memory, with what the teachers say of them."""
        side = self.model.image_size
        images = torch.randn(size, 3, side, side)
        target = torch.randint(CLASSES, (size,), device=self.model.device)
        texts, prototypes = self._constants[:2], self._constants[2:4]
        teachers = [Features(self._unit(size), texts[i], 100.0, prototypes[i]) for i in range(2)]
        return Batch(images, target, tuple(teachers))

    def gradients(self, batch: Batch, micro_batch: int | None) -> None:
        """Leave them in ``.grad``."""

        def encode_images(part: Tensor) -> Tensor:
            with self.precision.autocast():
                return self.model.encode_images(part)

        def encode_texts(part: Tensor) -> Tensor:
            with self.precision.autocast():
                return self.model.encode_texts(part)

        def losses(images: Tensor, texts: Tensor) -> Mapping[str, Tensor]:
            student = Features(images, texts, self.model.logit_scale, self._constants[4])
            return self._loss(student, batch.teachers, batch.target, output_dict=True)

        self.optimizer.zero_grad()
        backward(
            losses,
            Encoder(encode_images, (batch.images,)),
            Encoder(encode_texts, (self._texts,), split=False),
            micro_batch=micro_batch,
            scaler=self.precision.scaler,
        )

    def step(self, batch: Batch, micro_batch: int | None) -> float:
        """Take a step and return its seconds."""
        started = self._now()
        self.gradients(batch, micro_batch)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        return self._now() - started

    def _now(self) -> float:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)
        return time.perf_counter()

    def saved(self, batch: Batch, micro_batch: int | None) -> int:
        """Bytes that graphs keep at the peak, without weights and batch."""
        found = SavedBytes([*self.model.clip.parameters(), *batch.tensors()])
        with found.watching():
            self.gradients(batch, micro_batch)
        return found.peak

    def state_bytes(self) -> int:
        """Of all weights and of the optimiser's state, without gradients."""
        held = [*self.model.clip.parameters(), *self.model.clip.buffers()]
        held += [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(t.nbytes for t in held)


def measure(setting: Setting, m: int, factors: Sequence[int], rounds: int) -> list[Row]:
    """Rows of one model: B = M and `factors` times it, in micro-batches and, if it fits, whole.

    Raises:
        InputError: micro-batches do not give the gradients of the whole batch.
    """
    workload = Workload(setting)
    error = gradient_error(workload, m)
    allowed = TOLERANCE.get(setting.precision, TOLERANCE_HALF)
    print(f"{setting.model}: gradients differ from the whole batch's by {error:.1e}", flush=True)
    if not error <= allowed:
        raise InputError(f"{setting.model}: gradients differ by {error:.1e}, allowed {allowed:g}")
    sizes = sorted({m, *(m * f for f in factors)})
    points: list[Point] = [(b, m if b > m else None) for b in sizes]
    # Images whose graph takes half of what is free.
    each = workload.saved(workload.batch(m), None) / m
    fits = int(0.5 * free_memory(torch.device(setting.device)) / each)
    points += [(b, None) for b in sizes if m < b <= min(fits, MOST_TIMED * m)]
    times = time_points(workload, [p for p in points if p[0] <= MOST_TIMED * m], rounds)
    for size, micro in points:
        if size > MOST_TIMED * m:
            times[size, micro] = [workload.step(workload.batch(size), micro)]
    del workload
    rows: list[dict[str, Cell]] = []
    base: dict[str, float] = {}
    for size, micro in points:
        found = in_fresh_process(setting, (size, micro))
        base = base or found
        ratios = {
            f"{name}_ratio": found[f"{name}_mib"] / base[f"{name}_mib"]
            for name in ("saved", "peak", "with_batch")
            if f"{name}_mib" in found
        }
        own, whole = times[size, micro], times.get((size, None))
        of_m = np.divide(times[sizes[0], None], sizes[0])[: len(own)]
        rows.append(
            {
                "model": setting.model,
                "precision": setting.precision,
                "device": setting.device,
                "batch": size,
                "micro_batch": micro or size,
                **found,
                **ratios,
                "ms_per_image": 1e3 * median(own) / size,
                "time_ratio": float(np.median(np.divide(own, whole))) if whole else None,
                "time_of_m_ratio": float(np.median(np.divide(own, size) / of_m)),
                "rounds": len(own),
            }
        )
    return list(rows)


def gradient_error(workload: Workload, m: int) -> float:
    """Largest relative L2 distance of a weight's gradient from that of the whole batch, B = 4 M.

    Gradients that are noise, a thousandth of the largest norm or less, are measured by that.
    """
    batch = workload.batch(4 * m)
    found = []
    for micro_batch in (None, m):
        workload.gradients(batch, micro_batch)
        found.append([p.grad.double() for p in workload.weights if p.grad is not None])
    wanted, got = found
    floor = 1e-3 * max(float(w.norm()) for w in wanted)
    pairs = zip(got, wanted, strict=True)
    return max(float((g - w).norm()) / max(float(w.norm()), floor) for g, w in pairs)


def time_points(
    workload: Workload, points: Sequence[Point], rounds: int
) -> dict[Point, list[float]]:
    """Seconds of a step at every point, round by round, in turns."""
    batch = workload.batch(max(b for b, _ in points))
    names = {f"{b} in {m}": (b, m) for b, m in points}
    calls = {
        name: functools.partial(workload.step, batch.head(b), m) for name, (b, m) in names.items()
    }
    with no_garbage_collection():
        times = take_turns(calls, 0.0, rounds)
    return {names[name]: of_point for name, of_point in times.items()}


def in_fresh_process(setting: Setting, point: Point) -> dict[str, float]:
    """What `memory_of` finds."""
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, MALLOC), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(memory_of, setting, *point).result()


def memory_of(setting: Setting, size: int, micro_batch: int | None) -> dict[str, float]:
    """MiB that a step takes, by what it is.

    Two steps go before, so that the optimiser's state is there, and so are the buffers that
    libraries make once. There are no gradients when the step begins: it makes them.
    """
    workload = Workload(setting)
    small = workload.batch(micro_batch or size)
    for _ in range(2):
        workload.step(small, None)
    del small
    batch = workload.batch(size)
    workload.optimizer.zero_grad()
    state = workload.state_bytes()
    peak = PeakMemory(setting.device)
    workload.step(batch, micro_batch)
    growth = peak.growth()
    saved = workload.saved(batch, micro_batch)
    found = {"state": state, "batch": batch.bytes(), "saved": saved}
    if growth is not None:
        found |= {"growth": growth, "peak": state + growth}
        found["with_batch"] = found["peak"] + found["batch"]
    return {f"{name}_mib": size / MIB for name, size in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument("--models", nargs="+", default=["mulki-mini", "ViT-S-32"])
    parser.add_argument("--micro-batch", type=int, default=16, help="M")
    parser.add_argument("--factors", nargs="+", type=int, default=[1, 4, 16, 64], help="B / M")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="on the CPU; 0: as torch takes them")
    parser.add_argument("--rounds", type=int, default=5, help="of timing, beside one to warm up")
    a = parser.parse_args(argv)
    if a.threads:
        torch.set_num_threads(a.threads)
    print(machine_line(a.device), flush=True)
    for name in a.models:
        setting = Setting(name, a.precision, a.device, a.threads)
        rows = measure(setting, a.micro_batch, a.factors, a.rounds)
        show(rows, a.output, a.device)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"benchmarks.microbatch: error: {error}")
