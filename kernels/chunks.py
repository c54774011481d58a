# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""The schedule of large problems: it goes through the rows in chunks, and stores their logits.

For each chunk of rows, and every model m (the student and its teachers):

    Y_m = X_m W_m^T   torch.mm, written as [rows, P] float32; a chunk fits the second-level cache
    row statistics    `row_softmax`, which loads its tiles from Y_m; losses of the rows
    G                 `chunk_gradient`, written as [rows, P] in the dtype of X
    dX = G W          torch.mm, of these rows
    dW += G^T X       torch.mm, summed over the chunks

A program of `chunk_gradient` computes one tile of G in registers from tiles of Y_m, and writes it
once. Each product is computed once, where the other schedules compute the logits three times. The
results differ in the order of sums alone. `tiles.chunk_rows` says when this schedule is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, gradients, tiles
from .common import Model, ceil_div
from .gradients import LogitGradient, gradient_tile
from .launch import launch, multiply
from .sums import range_factor_of


@triton.jit(do_not_specialize=["first", "last", "n", "offset"])  # p is the row stride of G
def chunk_gradient(
    y_ptrs,  # models of [rows, P] float32
    y_strides,
    ones,  # a 1 per model: the column stride, which must be a compile-time constant
    scale_ptr,
    teacher_scales_ptr,
    bias_ptr,
    offset,
    row_values_ptr,  # [R, N], see `gradient_tile`
    mask_ptr,
    target_ptr,
    bound_ptr,
    out_ptr,  # [rows, P]
    first,  # the first sample of the chunk
    last,  # one more than its last sample
    n,
    p,
    inverse_temperature,
    MODELS: tl.constexpr,
    LOSS: tl.constexpr,
    LABELS: tl.constexpr,
    MASKED: tl.constexpr,
    RANGE_FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    rows = first + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    sample_zero_ptrs = ()  # of Y: row i at i strides, as in the row values
    for m in tl.static_range(MODELS):
        skipped = tl.cast(first, tl.int64) * y_strides[m]
        sample_zero_ptrs = sample_zero_ptrs + (y_ptrs[m] - skipped,)
    g = gradient_tile(
        sample_zero_ptrs, sample_zero_ptrs, y_strides, ones, ones, scale_ptr, teacher_scales_ptr,
        bias_ptr, offset, row_values_ptr, mask_ptr, target_ptr, None, 0, 0, rows, columns, last, p,
        n, inverse_temperature, range_factor_of(bound_ptr, RANGE_FACTOR), MODELS, LOSS, LABELS,
        False, MASKED, BLOCK_N, BLOCK_P, 16, True, True, "ieee", False,
    )  # fmt: skip
    inside = (rows < last)[:, None] & (columns < p)[None, :]
    at = (rows - first).to(tl.int64)[:, None] * p + columns[None, :]
    tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), mask=inside)


class Products(NamedTuple):
    """Products with G before `sums.result_factor` is applied; None where not wanted."""

    gw: Tensor | None  # G W [N, D] float32
    gx: Tensor | None  # G^T X [P, D] float32


class Chunks:
    """The buffers of the chunks, and the products with G that they are summed to."""

    def __init__(self, models: Sequence[Model], rows: int, wanted: Sequence[bool]) -> None:
        self.models = models
        x, w = models[0]
        self.row_ranges = [(i, min(i + rows, x.shape[0])) for i in range(0, x.shape[0], rows)]
        self.logits = common.empty_float32(x, len(models), rows, w.shape[0])
        # The interpreter computes bfloat16 in float32.
        self.dtype = torch.float32 if common.upcast(models) else x.dtype
        self.gradient = x.new_empty((rows, w.shape[0]), dtype=self.dtype)
        self.products = Products(
            common.empty_float32(x, *x.shape) if wanted[0] else None,
            common.empty_float32(w, *w.shape) if wanted[1] else None,
        )

    def compute_logits(self, first: int, last: int) -> list[Tensor]:
        """Y [last - first, P] of every model."""
        for model, logits in zip(self.models, self.logits, strict=True):
            multiply(model.features[first:last], model.prototypes.mT, logits[: last - first])
        return [logits[: last - first] for logits in self.logits]

    def add_products(self, g: LogitGradient, first: int, last: int, of_chunk: bool) -> None:
        """Compute G of the rows, and add its products.

        `of_chunk`: whether `g` has the row values of these rows alone, not those of all rows.
        """
        if self.products == (None, None):
            return
        device = tiles.Device.of(self.models)
        n, p = last - first, self.models[0].prototypes.shape[0]
        tile = tiles.stored_plan(device, n, p).tile
        start = 0 if of_chunk else first
        ys = [logits[:n] for logits in self.logits]
        launch(
            chunk_gradient,
            (ceil_div(p, tile.streamed), ceil_div(n, tile.kept)),
            self.gradient.device,
            tile.warps,
            tile.stages,
            **gradients.loss_arguments(g),
            y_ptrs=tuple(ys),
            y_strides=tuple(y.stride(0) for y in ys),
            ones=(1,) * len(ys),
            out_ptr=self.gradient,
            first=start,
            last=start + n,
            n=n if of_chunk else self.models[0].features.shape[0],
            p=p,
            MASKED=g.class_mask is not None or p % tile.streamed != 0,
            BLOCK_N=tile.kept,
            BLOCK_P=tile.streamed,
        )
        x, w = (operand.to(self.dtype) for operand in self.models[0])
        if self.products.gw is not None:
            multiply(self.gradient[:n], w, self.products.gw[first:last])
        if self.products.gx is not None:
            multiply(self.gradient[:n].mT, x[first:last], self.products.gx, add=first > 0)


def chunk_rows(models: Sequence[Model]) -> int:
    """Rows of a chunk, or 0 where another schedule is taken."""
    x, w = models[0]
    return tiles.chunk_rows(tiles.Device.of(models), x.shape[0], w.shape[0], len(models))


def run(
    models: Sequence[Model],
    rows: int,
    wanted: Sequence[bool],
    step: Callable[[int, int, list[Tensor]], LogitGradient],
) -> Products:
    """The products with G, where `step(first, last, logits)` describes G of a chunk."""
    chunks = Chunks(models, rows, wanted)
    for first, last in chunks.row_ranges:
        g = step(first, last, chunks.compute_logits(first, last))
        chunks.add_products(g, first, last, of_chunk=True)
    return chunks.products


def products_of(g: LogitGradient, wanted: Sequence[bool]) -> Products | None:
    """Products with a G whose row values are known for all rows; None for another schedule.

    Not for tf32: the row values come from tl.dot, which truncates float32 to tf32, and torch.mm may
    round it. Logits of 100 then differ by 0.07 (simulated), and so would the sum of a row of G.
    """
    rows = chunk_rows(g.models) if any(wanted[:2]) else 0
    if rows == 0 or tiles.Device.of(g.models).family == "tf32":
        return None
    chunks = Chunks(g.models, rows, wanted)
    for first, last in chunks.row_ranges:
        chunks.compute_logits(first, last)
        chunks.add_products(g, first, last, of_chunk=False)
    return chunks.products
