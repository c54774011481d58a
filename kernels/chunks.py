"""Blocks of logits: their memory, the products that make them, and the products with their G.

    Y_m = X_m W_m^T   of every model m, for the rows and columns of a block, in float32
    dX += G W         G lies over the student's Y, in the dtype of X
    dW += G^T X

All products are the library's. A block is a chunk of rows with all columns, or has a part of the
columns too (`schedule`); one after another takes the same memory. Results are summed in the order
of the blocks, so they repeat bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import common, schedule
from .common import Model, ceil_div, round_up
from .launch import Repeated, multiply
from .sums import Factors, scale_results

ROW_MULTIPLE = 8  # a program of a kernel may take so many rows at a time
COLUMN_MULTIPLE = 32  # so that rows are aligned, and a program may take so many columns


class Block(NamedTuple):
    """Rows [first, last) and columns [start, stop) of the logits."""

    first: int
    last: int
    start: int
    stop: int


class Blocks:
    """The blocks of a plan, and the memory in which one lies at a time."""

    def __init__(self, models: Sequence[Model], plan: schedule.Plan) -> None:
        x, w = models[0]
        self.n, self.p = x.shape[0], w.shape[0]
        self.rows, self.columns = min(plan.rows, self.n), min(plan.columns, self.p)
        self.stride = round_up(self.columns, COLUMN_MULTIPLE)
        rows = round_up(self.rows, ROW_MULTIPLE)
        # The interpreter computes bfloat16 in float32.
        dtype = torch.float32 if common.upcast(models) else x.dtype
        logits = common.empty_float32(x, len(models), rows, self.stride)
        self.of_models, self._products = logits.unbind(), products_of(models, logits)
        self.g = self.of_models[0].view(dtype)
        self.architecture = common.architecture(x.device)
        # A view takes the host a microsecond, and chunks have most of theirs in common.
        self._views: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}

    def __iter__(self) -> Iterator[list[Block]]:
        """The blocks of a chunk of rows, for one chunk after another."""
        starts = range(0, self.p, self.columns)
        for first in range(0, self.n, self.rows):
            last = min(first + self.rows, self.n)
            yield [Block(first, last, s, min(s + self.columns, self.p)) for s in starts]

    @property
    def once(self) -> tuple[bool, bool]:
        """Whether dX and dW are one product for each of their rows."""
        return self.columns >= self.p, self.rows >= self.n

    def loaded(self, columns: int) -> int:
        """Columns that a row has memory for."""
        return min(round_up(columns, COLUMN_MULTIPLE), self.stride)

    def compute_logits(self, block: Block) -> None:
        """Write Y of every model, over those of the block before."""
        first, last, start, stop = block
        key = last - first, start, stop
        if key not in self._views:
            self._views[key] = [
                (w[..., start:stop, :].mT, y[..., : last - first, : stop - start])
                for _, w, y in self._products
            ]
        for (x, *_), of_block in zip(self._products, self._views[key], strict=True):
            multiply(x[..., first:last, :], *of_block)

    def visit(
        self,
        kernels: Sequence[BlockKernel],
        gradients: OperandGradients | None = None,
        blocks: Iterable[Block] | None = None,
        stored: bool = False,
    ) -> None:
        """Launch kernels for the logits of one block after another, and add the products with G.

        Args:
            gradients: to which they are added; None where the kernels make no G.
            blocks: None for all.
            stored: whether the logits of the only block are in memory already.
        """
        for block in chain.from_iterable(self) if blocks is None else blocks:
            if not stored:
                self.compute_logits(block)
            for launch_kernel in kernels:
                launch_kernel(block)
            if gradients is not None:
                gradients.add(self.g, block)


def products_of(models: Sequence[Model], logits: Tensor) -> Sequence[tuple[Tensor, ...]]:
    """X, W and Y of each product: of each model, or of all at once where their operands lie so.

    All at once is a batched product, [M, N, D] times [M, D, P], of operands at equal distances in
    one memory. Others are not copied there, which would take as many launches. Some models alone
    are no batch: then a teacher that equals the student might have other logits.
    """
    xs, ws = zip(*models, strict=True)
    if (x := _stacked(xs)) is not None and (w := _stacked(ws)) is not None:
        return [(x, w, logits)]
    return [(*model, y) for model, y in zip(models, logits, strict=True)]


def _stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    first, *others = tensors
    memory, layout = first.untyped_storage()._cdata, (first.dtype, first.shape, first.stride())
    for t in others:
        if t.untyped_storage()._cdata != memory or (t.dtype, t.shape, t.stride()) != layout:
            return None
    gaps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(tensors)}
    shape, strides = (len(tensors), *first.shape), (*gaps, *first.stride())
    return first.as_strided(shape, strides) if len(gaps) == 1 and min(gaps) >= 0 else None


class OperandGradients:
    """dX and dW of the student, summed over blocks."""

    def __init__(
        self,
        model: Model,
        wanted: Sequence[bool],
        dtype: torch.dtype,
        factors: Factors,
        once: tuple[bool, bool],  # whether dX and dW are one product for each of their rows
    ) -> None:
        self.model, self.dtype, self.factors = model, dtype, factors
        # What has its factors may be rounded: one product at once, a sum of some at its end.
        rounded = dtype if factors.largest is None else torch.float32
        self.parts = rounded != torch.float32 and not once[0]  # of dX, in float32
        self.of_rows: Tensor | None = None
        self.sums = [
            t.new_empty(t.shape, dtype=rounded if one else torch.float32) if want else None
            for t, want, one in zip(model, wanted, (True, once[1]), strict=False)
        ]

    def add(self, g: Tensor, block: Block) -> None:
        """Add the products with G of a block."""
        x, w = self.model
        g = g[: block.last - block.first, : block.stop - block.start]
        of_x, of_w = self.sums
        if of_x is not None:
            to = rows = of_x[block.first : block.last]
            if self.parts:
                if self.of_rows is None:
                    self.of_rows = common.empty_float32(x, *to.shape)
                rows = self.of_rows[: len(to)]
            multiply(g, w[block.start : block.stop], rows, add=block.start > 0)
            if self.parts and block.stop == len(w):
                to.copy_(rows)
        if of_w is not None:
            to = of_w[block.start : block.stop]
            multiply(g.mT, x[block.first : block.last], to, add=block.first > 0)

    def finished(self) -> list[Tensor]:
        """dX and dW; empty where not wanted."""
        new = partial(self.model.features.new_empty, dtype=self.dtype)
        if self.factors.largest is None:
            return [new(0) if t is None else t.to(self.dtype) for t in self.sums]
        given = [t for t in self.sums if t is not None]
        found = [t if t.dtype == self.dtype else new(t.shape) for t in given]
        scale_results(list(zip(given, found, strict=True)), self.factors)
        return [new(0) if t is None else found.pop(0) for t in self.sums]


class BlockKernel(ABC):
    """Launches a kernel for one block after another.

    Args:
        swap: whether the kernel's rows are the columns of a block.
    """

    def __init__(self, swap: bool = False) -> None:
        self._swap = swap
        self._of_size: dict[tuple[int, int], Repeated] = {}

    def __call__(self, block: Block) -> None:
        size = block.last - block.first, block.stop - block.start
        if size not in self._of_size:
            self._of_size[size] = self._for_size(*size)
        row, _, column, _ = block
        if self._swap:
            row, column = column, row
        self._of_size[size](first_row=row, first_column=column)

    @abstractmethod
    def _for_size(self, n: int, p: int) -> Repeated:
        """The launch for blocks of n rows and p columns, but for where they begin."""


def row_programs(blocks: int, warps: int, device: torch.device) -> int:
    """Of a kernel whose programs take one block of rows after another.

    No more than may run at a time, if their registers let them: a multiprocessor holds at most 64
    warps, and 32 programs.
    """
    return min(blocks, common.resident_programs(device, min(32, 64 // warps)))


class PairKernel(BlockKernel):
    """A kernel that makes G of pairs, given logits and what is known of rows and columns."""

    def __init__(self, kernel: Any, blocks: Blocks, gradient: bool, **arguments: Any) -> None:
        super().__init__()
        self._kernel, self._blocks, self._gradient = kernel, blocks, gradient
        self._arguments = arguments

    def _for_size(self, n: int, p: int) -> Repeated:
        blocks = self._blocks
        tile = schedule.row_tile(blocks.architecture, 3, p)
        loaded = blocks.loaded(p)
        return Repeated(
            self._kernel,
            (row_programs(ceil_div(n, tile.rows), tile.warps, blocks.g.device),),
            tile.warps,
            1,
            y_ptr=blocks.of_models[0],
            row_stride=blocks.stride,
            g_ptr=blocks.g if self._gradient else None,
            g_stride=blocks.g.stride(0),
            n=n,
            p=p,
            loaded=loaded,
            MASKED=p % tile.columns != 0,
            EVEN=loaded % tile.columns == 0,
            ROWS=tile.rows,
            BLOCK_P=tile.columns,
            **self._arguments,
        )
