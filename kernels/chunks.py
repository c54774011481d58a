# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""The schedule of large problems: logits of a chunk of rows are stored for a moment.

    Y_m = X_m W_m^T by the vendor's matrix product, [rows, P] float32, small enough for the cache
    statistics and losses of the rows, as `row_softmax` does from products of its own
    G, in the dtype of X, by `chunk_gradient`, whose programs own one tile each
    dX = G W of these rows, dW += G^T X, again by the vendor's product

Each product is made once, where the other schedules make those of the logits three times. Results
are the same up to the order of sums. `tiles.chunk_rows` says when, and how many rows.
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
from .launch import launch
from .sums import lift_of


@triton.jit(do_not_specialize=["first", "last", "n", "offset"])  # rows of G are p apart
def chunk_gradient(
    y_ptrs,  # models of [rows, P] float32
    y_strides,
    ones,  # as many times 1
    scale_ptr,
    teacher_scales_ptr,
    bias_ptr,
    offset,
    rows_ptr,  # [R, N]
    mask_ptr,
    target_ptr,
    peak_ptr,
    out_ptr,  # [rows, P]
    first,  # the sample of row 0
    last,  # the sample behind the last row
    n,
    p,
    inverse_temperature,
    MODELS: tl.constexpr,
    LOSS: tl.constexpr,
    LABELS: tl.constexpr,
    MASKED: tl.constexpr,
    LIFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    rows = first + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    from_sample_zero = ()
    for m in tl.static_range(MODELS):
        before = tl.cast(first, tl.int64) * y_strides[m]
        from_sample_zero = from_sample_zero + (y_ptrs[m] - before,)
    g = gradient_tile(
        from_sample_zero, from_sample_zero, y_strides, ones, ones, scale_ptr, teacher_scales_ptr,
        bias_ptr, offset, rows_ptr, mask_ptr, target_ptr, None, 0, 0, rows, columns, last, p, n,
        inverse_temperature, lift_of(peak_ptr, LIFT), MODELS, LOSS, LABELS, False, MASKED,
        BLOCK_N, BLOCK_P, 16, True, True, "ieee", False,
    )  # fmt: skip
    inside = (rows < last)[:, None] & (columns < p)[None, :]
    at = (rows - first).to(tl.int64)[:, None] * p + columns[None, :]
    tl.store(out_ptr + at, g.to(out_ptr.dtype.element_ty), mask=inside)


class Products(NamedTuple):
    """Sums over G as it was formed, before the factors of the result; None where not wanted."""

    gw: Tensor | None  # [N, D] float32
    gx: Tensor | None  # [P, D] float32


class Chunks:
    """Goes through the rows in chunks, and adds up the products with their G."""

    def __init__(self, models: Sequence[Model], rows: int, wanted: Sequence[bool]) -> None:
        self.models = models
        x, w = models[0]
        self.bounds = [(i, min(i + rows, x.shape[0])) for i in range(0, x.shape[0], rows)]
        self.logits = common.empty(x, len(models), rows, w.shape[0])
        # The interpreter's bfloat16 is float32.
        self.dtype = torch.float32 if common.upcast(models) else x.dtype
        self.gradient = x.new_empty((rows, w.shape[0]), dtype=self.dtype)
        self.products = Products(
            common.empty(x, *x.shape) if wanted[0] else None,
            common.empty(w, *w.shape) if wanted[1] else None,
        )

    def stored(self, first: int, last: int) -> list[Tensor]:
        """Y [last - first, P] of every model."""
        for model, logits in zip(self.models, self.logits, strict=True):
            _multiply(model.x[first:last], model.w.mT, logits[: last - first])
        return [logits[: last - first] for logits in self.logits]

    def add(self, g: LogitGradient, first: int, last: int, of_rows: bool) -> None:
        """Form G of the rows and add its products; `g` knows these rows alone, if `of_rows`."""
        if self.products == (None, None):
            return
        device = tiles.Device.of(self.models)
        n, p = last - first, self.models[0].w.shape[0]
        tile = tiles.stored_plan(device, n, p).tile
        offset = 0 if of_rows else first
        ys = [logits[:n] for logits in self.logits]
        launch(
            chunk_gradient,
            (ceil_div(p, tile.other), ceil_div(n, tile.own)),
            self.gradient.device,
            tile.warps,
            tile.stages,
            **gradients.loss_arguments(g),
            y_ptrs=tuple(ys),
            y_strides=tuple(y.stride(0) for y in ys),
            ones=(1,) * len(ys),
            out_ptr=self.gradient,
            first=offset,
            last=offset + n,
            n=n if of_rows else self.models[0].x.shape[0],
            p=p,
            MASKED=g.class_mask is not None or p % tile.other != 0,
            BLOCK_N=tile.own,
            BLOCK_P=tile.other,
        )
        x, w = (operand.to(self.dtype) for operand in self.models[0])
        if self.products.gw is not None:
            _multiply(self.gradient[:n], w, self.products.gw[first:last])
        if self.products.gx is not None:
            multiply = _multiply if first == 0 else _add_product
            multiply(self.gradient[:n].mT, x[first:last], self.products.gx)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b in float32."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        torch.mm(a.float(), b.float(), out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b in float32."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        out.addmm_(a.float(), b.float())
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def row_chunks(models: Sequence[Model]) -> int:
    """Rows of a chunk, or 0 where the other schedules serve."""
    return tiles.chunk_rows(
        tiles.Device.of(models), models[0].x.shape[0], models[0].w.shape[0], len(models)
    )


def run(
    models: Sequence[Model],
    rows: int,
    wanted: Sequence[bool],
    step: Callable[[int, int, list[Tensor]], LogitGradient],
) -> Products:
    """`step` looks at the logits of rows [first, last) and says what their G is."""
    chunks = Chunks(models, rows, wanted)
    for first, last in chunks.bounds:
        chunks.add(step(first, last, chunks.stored(first, last)), first, last, of_rows=True)
    return chunks.products


def products_of(g: LogitGradient, wanted: Sequence[bool]) -> Products | None:
    """Products with a G that is known for all rows, or None where the other schedules serve.

    What is known of the rows comes from tl.dot, which cuts float32 off to tf32 where torch.mm may
    round it: logits of 100 then differ by 0.07 (simulated), and G would not sum to zero by as much.
    """
    rows = row_chunks(g.models) if any(wanted[:2]) else 0
    if rows == 0 or tiles.Device.of(g.models).family == "tf32":
        return None
    chunks = Chunks(g.models, rows, wanted)
    for first, last in chunks.bounds:
        chunks.stored(first, last)
        chunks.add(g, first, last, of_rows=False)
    return chunks.products
