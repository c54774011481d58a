"""Instructions of a whole warp: matrix products, loads of matrices, and exchanges between lanes."""

from __future__ import annotations

import numpy as np

from tests.kernels.ptx.arithmetic import Lanes

LANE = np.arange(32)
GROUP, PLACE = LANE // 4, LANE % 4  # of a lane in a fragment of a matrix


def product_16x8x16(a: list[Lanes], b: list[Lanes], c: list[Lanes], half: str) -> list[Lanes]:
    """Of f16 or bf16: fragments of A [16, 16] and B [16, 8] in pairs of elements, and of C."""
    left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    for i, pair in enumerate(a):
        row, column = GROUP + 8 * (i % 2), 2 * PLACE + 8 * (i // 2)
        left[row, column], left[row, column + 1] = _halves(pair, half)
    for i, pair in enumerate(b):
        right[2 * PLACE + 8 * i, GROUP], right[2 * PLACE + 8 * i + 1, GROUP] = _halves(pair, half)
    return _accumulated(left @ right, c)


def product_16x8x8(a: list[Lanes], b: list[Lanes], c: list[Lanes]) -> list[Lanes]:
    """Of tf32, whose lowest 13 bits count for nothing."""
    left, right = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
    for i, one in enumerate(a):
        left[GROUP + 8 * (i % 2), PLACE + 4 * (i // 2)] = _tf32(one)
    for i, one in enumerate(b):
        right[PLACE + 4 * i, GROUP] = _tf32(one)
    return _accumulated(left @ right, c)


def _accumulated(product: Lanes, c: list[Lanes]) -> list[Lanes]:
    return [
        (product[GROUP + 8 * (i // 2), 2 * PLACE + i % 2] + one.view(np.float32)).view(np.uint32)
        for i, one in enumerate(c)
    ]


def _halves(pair: Lanes, half: str) -> tuple[Lanes, Lanes]:
    if half == "bf16":
        return (pair << np.uint32(16)).view(np.float32), _tf32(pair, 0xFFFF0000)
    both = pair.view(np.float16).reshape(-1, 2).astype(np.float32)
    return both[:, 0], both[:, 1]


def _tf32(bits: Lanes, kept: int = 0xFFFFE000) -> Lanes:
    return (bits & np.uint32(kept)).view(np.float32)


def matrix(rows: Lanes, transposed: bool) -> Lanes:
    """What ldmatrix gives each lane of 8 rows of 8 elements of 16 bits."""
    elements = rows.view(np.uint16).reshape(8, 8)
    if transposed:
        elements = elements.T
    return np.ascontiguousarray(elements).view(np.uint32)[GROUP, PLACE]


def rows_of(given: Lanes, transposed: bool) -> Lanes:
    """The rows of a matrix of which each lane gives two elements, for stmatrix."""
    elements = given.view(np.uint16).reshape(8, 8)
    if transposed:
        elements = elements.T
    return np.ascontiguousarray(elements).view(np.uint32)


def exchanged(kind: str, values: Lanes, other: Lanes) -> Lanes:
    """What shfl gives each lane, of all 32."""
    if kind == "bfly":
        return values[LANE ^ other.astype(np.int64)]
    if kind == "idx":
        return values[other.astype(np.int64) & 31]
    raise NotImplementedError(f"PTX: no interpretation of shfl.sync.{kind}")
