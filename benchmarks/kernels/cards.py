"""A model of time on four GPUs: published peaks, and assumptions. Nothing here was measured.

A launch takes the longest of three: its products at a share of the peak rate (of a kernel with few
programs, the rate of as many multiprocessors), its bytes at a share of the peak bandwidth, and what
it costs the host. The shares and the host's costs are assumptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.kernels.counts import Work


class Card(NamedTuple):
    """Peaks from the makers' data sheets: operations per second without sparsity, and bytes."""

    half: float
    tf32: float
    float32: float  # NVIDIA: without tensor cores
    bandwidth: float
    multiprocessors: int


CARDS = {
    "A100": Card(312e12, 156e12, 19.5e12, 2.039e12, 108),  # SXM, 80 GB
    "H100": Card(989e12, 494e12, 67e12, 3.35e12, 132),  # SXM
    "B200": Card(2250e12, 1125e12, 75e12, 8e12, 148),
    "MI300X": Card(1307e12, 654e12, 163e12, 5.3e12, 304),
}
# Shares of the peak rate that products reach: the library's, and those of tl.dot in our kernels.
RATE = {"library": 0.7, "kernel": 0.4, "torch": 0.7}
BANDWIDTH = 0.8
# Seconds of the host for each launch, for which the device waits: of an operation of PyTorch; of
# what operators launch from Python, with views and arguments; and in a CUDA graph.
LAUNCH, PYTHON_LAUNCH, GRAPH_LAUNCH = 6e-6, 12e-6, 1.5e-6


def seconds(work: Iterable[Work], card: Card, number_format: str, launch: float = LAUNCH) -> float:
    """The modelled time of launches, one after another."""
    total = 0.0
    for one in work:
        rate = RATE[one.source] * _peak(card, number_format, one.source)
        products = one.operations / (rate * min(1.0, one.programs / card.multiprocessors))
        total += max(products, one.bytes / (BANDWIDTH * card.bandwidth), launch)
    return total


def _peak(card: Card, number_format: str, source: str) -> float:
    if number_format in ("bf16", "fp16"):
        return card.half
    if number_format == "tf32":
        return card.tf32
    # tf32x3: our kernels multiply strict float32 as three products of tf32 on NVIDIA's GPUs.
    if number_format == "fp32" and source == "kernel":
        return max(card.float32, card.tf32 / 3)
    return card.float32
