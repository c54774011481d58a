"""How the logits [N, P] of K + 1 models are cut into blocks that are worked on one after another.

A block is some rows and, where P is large, some columns. All that is stored of its logits, of all
models, takes at most MULKI_CHUNK_MB mebibytes (default 64, on the CPU 16), whatever N and P.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mulki.ops.chunked.products import Products, budget

# Fewer rows than these make products slow.
LEAST_ROWS = 64


def cut(count: int, most: int) -> list[slice]:
    """The numbers from 0 to `count` in parts of one size but for the last, at least one part."""
    parts = max(-(-count // max(most, 1)), 1)
    size = max(-(-count // parts), 1)
    return [slice(i, min(i + size, count)) for i in range(0, max(count, 1), size)]


class Blocks(NamedTuple):
    """Rows and columns of blocks."""

    rows: list[slice]
    columns: list[slice]

    @property
    def is_one(self) -> bool:
        return len(self.rows) == len(self.columns) == 1

    @classmethod
    def of(cls, models: Sequence[Products], copies: int, with_g: bool) -> Blocks:
        """Blocks of all columns where these have LEAST_ROWS rows, else of rows and columns.

        Args:
            copies: of the logits of all models in a block.
            with_g: whether G is made of them, which may be rounded.
        """
        student = models[0]
        n, p, size = len(student.x), len(student.w), student.dtype.itemsize
        eighths = budget(student.x.device.type) // 8
        bytes_of_logit = copies * len(models) * size
        if with_g and student.rounds_g:
            bytes_of_logit += student.x.element_size()
        # Two eighths are for rows of X that are copied, and one for those of W that are cast.
        logits = max((5 if student.is_cast else 6) * eighths // bytes_of_logit, 1)
        widths = sum(model.x.shape[1] for model in (*models, student))
        most = max(2 * eighths // max(widths * size, 1), LEAST_ROWS)
        if min(n, LEAST_ROWS) * p <= logits:
            return cls(cut(n, min(logits // max(p, 1), most)), cut(p, p))
        rows = min(n, 4 * LEAST_ROWS)
        return cls(cut(n, rows), cut(p, logits // rows))


class Logits:
    """X W^T of several models, a block at a time, in memory that the next block takes."""

    def __init__(self, models: Sequence[Products], blocks: Blocks, copies: int) -> None:
        first = models[0]
        self._models = models
        n, p = (max(part.stop - part.start for part in parts) for parts in blocks)
        self._memory = first.x.new_empty(copies, len(models) * n * p, dtype=first.dtype)

    def of(self, rows: slice, columns: slice) -> tuple[Tensor, ...]:
        """Logits [models, rows, columns] without their scales, and memory of that shape."""
        shape = len(self._models), rows.stop - rows.start, columns.stop - columns.start
        # Contiguous: one loop goes over all of it.
        views = [copy[: math.prod(shape)].view(shape) for copy in self._memory]
        for model, out in zip(self._models, views[0], strict=True):
            model.logits(rows, columns, out)
        return tuple(views)


def own(rows: slice, columns: slice, offset: int = 0) -> slice:
    """The rows of a block whose own logit, in column i + offset, lies in it."""
    first = max(rows.start, columns.start - offset)
    return slice(first, max(min(rows.stop, columns.stop - offset), first))


def diagonal(u: Tensor, rows: slice, columns: slice, offset: int = 0) -> Tensor:
    """The own logits of a block [..., rows, columns], as a view."""
    found = own(rows, columns, offset)
    of_rows = u[..., found.start - rows.start : found.stop - rows.start, :]
    first = found.start + offset - columns.start
    return of_rows[..., first : first + found.stop - found.start].diagonal(0, -2, -1)
