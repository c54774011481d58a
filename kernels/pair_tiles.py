# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Device functions of the kernels that make G of pairs from stored logits, tile by tile."""

import triton
import triton.language as tl


@triton.jit
def log_of_rows(u, lse_ptr, samples, inside):
    """log2 of the softmax over rows of u [ROWS, BLOCK_P]; lse [N, 2] is the sum of two numbers."""
    high = tl.load(lse_ptr + 2 * samples, mask=inside, other=0.0)
    low = tl.load(lse_ptr + 2 * samples + 1, mask=inside, other=0.0)
    return (u - high[:, None] - low[:, None]) * 1.4426950408889634


@triton.jit
def log_of_columns(u, lse_ptr, pairs, within):
    """log2 of the softmax over columns."""
    high = tl.load(lse_ptr + 2 * pairs, mask=within, other=0.0)
    low = tl.load(lse_ptr + 2 * pairs + 1, mask=within, other=0.0)
    return (u - high[None, :] - low[None, :]) * 1.4426950408889634


@triton.jit
def store_gradient(g_ptr, g_stride, rows, columns, g, loaded, EVEN: tl.constexpr):
    """Write a tile of G over logits of this tile and earlier ones."""
    # In half precision it lies over logits that other threads of the program read.
    tl.debug_barrier()
    at = g_ptr + rows.to(tl.int64)[:, None] * g_stride + columns[None, :]
    g = g.to(g_ptr.dtype.element_ty)
    if EVEN:
        tl.store(at, g)
    else:
        tl.store(at, g, mask=(columns < loaded)[None, :])


@triton.jit
def add_to_rows(row_ptr, samples, inside, before, values):
    """Write a number per row [N], or add it where `before`: where blocks of columns were before."""
    found = tl.load(row_ptr + samples, mask=before, other=0.0)
    tl.store(row_ptr + samples, found + values, mask=inside)
