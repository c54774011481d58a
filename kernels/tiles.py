# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""What all kernels share: operands, a tile of X W^T, its size, and how float32 is multiplied.

Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, but not for those in
COUNTS, on which no vectorised load depends: N and P often change.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mulki.ops import checks

COUNTS = ("n", "p", "first_row", "total", "parts", "ignore_index", "offset")
jit_kernel = triton.jit(do_not_specialize=COUNTS)  # decorates the functions that are launched


class Operands(NamedTuple):
    """X, W and scale of one model or of several, the student first."""

    x: tuple[Tensor, ...]  # [N, D_m], the elements of a row contiguous
    w: tuple[Tensor, ...]  # [P, D_m], likewise
    x_strides: tuple[int, ...]
    w_strides: tuple[int, ...]
    widths: tuple[int, ...]  # D_m
    scales: tuple[Tensor, ...]  # 0-d

    @classmethod
    def of(cls, xs: Sequence[Tensor], ws: Sequence[Tensor], scales: Sequence[Tensor]) -> Operands:
        x, w = tuple(map(contiguous_rows, xs)), tuple(map(contiguous_rows, ws))
        strides = tuple(v.stride(0) for v in x), tuple(v.stride(0) for v in w)
        return cls(x, w, *strides, tuple(v.shape[1] for v in x), tuple(scales))


class Tile(NamedTuple):
    """What a program takes at a time, a constant of the kernel."""

    rows: int
    columns: int
    depth: int  # of D, for one tl.dot
    warps: int
    stages: int
    even: bool = False  # every D is a multiple of the depth
    precision: str = "ieee"  # of tl.dot
    upcast: bool = False  # whether operands are converted to float32 as they are loaded

    def options(self) -> dict[str, Any]:
        """Of a launch. Without fused multiply-add a KL of equal models is exactly zero."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}


def tile_of(operands: Operands, n: int) -> Tile:
    """The tile of a kernel that multiplies, for N rows.

    A program has few rows where N is small, so that there are more programs. Its registers hold a
    tile of float32 for each model, and one of G.
    """
    x, tiles, half = operands.x[0], len(operands.x) + 1, 2
    few = n <= 2048 or tiles > 6
    if x.device.type == "cpu":  # the interpreter; so small that tests have several
        tile = Tile(16, 16, 16, 1, 1)
    elif x.element_size() > half and few:  # float32, split into three numbers to be multiplied
        tile = Tile(16, 64, 32, 4 if tiles <= 4 else 8, 2)
    elif x.element_size() > half:
        tile = Tile(32, 64 if tiles <= 4 else 32, 32, 8, 2)
    elif few:
        tile = Tile(16, 128 if tiles <= 4 else 64 if tiles <= 6 else 32, 64, 4, 3)
    else:
        tile = Tile(64, 64 if tiles <= 4 else 32, 64, 8, 3)
    even = all(width % tile.depth == 0 for width in operands.widths)
    return tile._replace(even=even, precision=precision(x), upcast=dtype_of_g(x) != x.dtype)


def contiguous_rows(operand: Tensor) -> Tensor:
    """The operand, copied unless the elements of a row are contiguous."""
    return operand if operand.stride(1) == 1 or operand.shape[1] == 1 else operand.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as contiguous uint8."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def new_float32(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor on the device of `like`."""
    return like.new_empty(shape, dtype=torch.float32)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes microseconds when it is called on the host


def dtype_of_g(x: Tensor) -> torch.dtype:
    """In which kernels multiply X, and write G: that of X.

    In Triton's interpreter bfloat16 is converted to float32: it would compute with its bits.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.float32 if x.dtype == torch.bfloat16 and interpreted else x.dtype


def precision(x: Tensor) -> str:
    """The input_precision of tl.dot: tf32 where PyTorch allows it, else a product of float32.

    tf32x3, three products of tf32, is as exact and takes tensor cores. AMD's compiler refuses it.
    MULKI_INPUT_PRECISION overrides this; another value than these is a ValueError.
    """
    if x.dtype != torch.float32 or x.is_cpu:
        return "ieee"
    if asked := os.environ.get("MULKI_INPUT_PRECISION", ""):
        checks.choice("MULKI_INPUT_PRECISION", asked, ("ieee", "tf32", "tf32x3"))
        return asked
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@triton.jit
def row_product(
    x_ptr,  # [N, D]
    w_ptr,  # [P, D]
    x_rows,  # [rows] int64, within X
    w_rows,  # [columns] int64, within W
    x_stride,
    w_stride,
    d,
    TILE: tl.constexpr,
):
    """The tile of X W^T, in float32."""
    PRECISION: tl.constexpr = TILE.precision  # Triton 3.6 hands on no string that has no name
    steps = tl.arange(0, TILE.depth)
    x_ptrs = x_ptr + (x_rows[:, None] * x_stride + steps[None, :])
    w_ptrs = w_ptr + (w_rows[None, :] * w_stride + steps[:, None])
    y = tl.zeros([x_rows.shape[0], w_rows.shape[0]], tl.float32)
    for k in range(0, d, TILE.depth):
        if TILE.even:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = k + steps < d
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        if TILE.upcast:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        y = tl.dot(x, w, y, input_precision=PRECISION)
        x_ptrs += TILE.depth
        w_ptrs += TILE.depth
    return y


@triton.jit
def logit_tiles(
    operands,
    logits,  # [n', P] float32 of every model, without their scales; None to multiply
    rows,  # of `logits`
    samples,  # of X, int64
    columns,
    n,  # rows of `logits`
    total,  # N
    p,
    TILE: tl.constexpr,
):
    """A tile of X W^T of every model. What lies outside repeats a row or a column at the edge."""
    ys = ()
    x_rows = tl.minimum(samples, total - 1)
    w_rows = tl.minimum(columns, p - 1).to(tl.int64)
    for m in tl.static_range(len(operands.scales)):
        if logits is None:
            y = row_product(
                operands.x[m], operands.w[m], x_rows, w_rows, operands.x_strides[m],
                operands.w_strides[m], operands.widths[m], TILE,
            )  # fmt: skip
        else:
            at = tl.minimum(rows, n - 1).to(tl.int64)[:, None] * p + columns[None, :]
            y = tl.load(logits[m] + at, mask=(columns < p)[None, :], other=0.0)
        ys = ys + (y,)
    return ys
