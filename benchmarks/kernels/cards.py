"""A model of time on four GPUs: published peaks, and assumptions. Nothing here was measured.

It is the model by which the kernels choose (`mulki.kernels.schedule`), for every provider alike.
What a card's L2 gives a second is assumed to be as many times its bandwidth as an H100's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.kernels.counts import Work
from mulki.kernels.schedule import H100, Rates, launch_seconds


class Card(NamedTuple):
    """Peaks from the makers' data sheets: operations per second without sparsity, and bytes."""

    half: float
    tf32: float
    float32: float  # NVIDIA: without tensor cores
    bandwidth: float
    multiprocessors: int
    cache: int  # bytes of L2; of an MI300X the Infinity Cache


CARDS = {
    "A100": Card(312e12, 156e12, 19.5e12, 2.039e12, 108, 40 << 20),  # SXM, 80 GB
    "H100": Card(989e12, 494e12, 67e12, 3.35e12, 132, 50 << 20),  # SXM
    "B200": Card(2250e12, 1125e12, 75e12, 8e12, 148, 126 << 20),
    "MI300X": Card(1307e12, 654e12, 163e12, 5.3e12, 304, 256 << 20),
}
# Seconds of the host for each launch: of an operation of PyTorch, and of what operators launch from
# Python, with views and arguments. In a CUDA graph there are none.
TORCH_HOST, PYTHON_HOST = 6e-6, 12e-6


def rates(card: Card, numbers: str) -> Rates:
    """What a card does, as the model has it of an H100."""
    family = {"bf16": "half", "fp16": "half", "tf32": "tf32"}.get(numbers, "float")
    of = {"half": card.half, "tf32": card.tf32, "float": card.float32}[family]
    known, peaks = H100[family], CARDS["H100"]
    times = of / {"half": peaks.half, "tf32": peaks.tf32, "float": peaks.float32}[family]
    faster = card.bandwidth / peaks.bandwidth
    return Rates(
        known.library * times,
        known.kernel * times,
        known.bandwidth * faster,
        known.cached * faster,
        round(known.cache * card.cache / peaks.cache),
        card.multiprocessors,
    )


def seconds(work: Sequence[Work], card: Card, numbers: str, host: float = 0.0) -> float:
    """The modelled time of launches, one after another; the host's, where that is longer."""
    found = rates(card, numbers)
    device = sum(
        launch_seconds(found, one.padded, one.bytes, one.held, one.programs, one.again)
        for one in work
    )
    return max(device, host * len(work))
