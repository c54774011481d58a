# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Device functions that several kernels call: tiles of Y = A B^T and of G, and the scale.

`row_product` computes a tile [BLOCK_A, BLOCK_B] of Y. It takes DEPTH columns of A and B per step,
one tl.dot each, and sums them in a float32 accumulator in registers. The tile is not rounded, and
nothing is written.
"""

import triton
import triton.language as tl

# Integer arguments that no vectorised load or store depends on. Triton compiles a kernel again for
# an integer that is 1 or a multiple of 16; for these it must not, since N and P often change. That
# holds for arguments of their own alone: in a tuple each integer would be specialized.
COUNTS = (
    *("n", "p", "first_row", "first_column", "classes", "ignore_index"),
    *("state_rows", "sum_rows", "offset"),
)
jit_kernel = triton.jit(do_not_specialize=COUNTS)  # decorates the functions that are launched


@triton.jit
def row_product(
    a_ptr,  # [A, D]
    b_ptr,  # [B, D]
    a_rows,  # [BLOCK_A] int64, within A
    b_rows,  # [BLOCK_B] int64, within B
    a_stride,
    b_stride,
    d,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,  # D is a multiple of DEPTH
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The tile of Y for the given rows of A and B."""
    steps = tl.arange(0, DEPTH)
    a_ptrs = a_ptr + (a_rows[:, None] * a_stride + steps[None, :])
    b_ptrs = b_ptr + (b_rows[None, :] * b_stride + steps[:, None])
    y = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for k in range(0, d, DEPTH):
        if EVEN_DEPTH:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = k + steps < d
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        y = tl.dot(a, b, y, input_precision=PRECISION)
        a_ptrs += DEPTH
        b_ptrs += DEPTH
    return y


@triton.jit
def load_logits(row_ptrs, columns, column_stride, loaded, EVEN: tl.constexpr):
    """A tile of stored logits; `loaded` columns may be read."""
    at = row_ptrs[:, None] + columns[None, :] * column_stride
    if EVEN:
        y = tl.load(at)
    else:
        y = tl.load(at, mask=(columns < loaded)[None, :], other=0.0)
    return y


@triton.jit
def store_gradient(row_ptrs, columns, g, loaded, EVEN: tl.constexpr):
    """Write a tile of G; in half precision it lies over logits of this tile and earlier ones."""
    at = row_ptrs[:, None] + columns[None, :]
    g = g.to(row_ptrs.dtype.element_ty)
    if EVEN:
        tl.store(at, g)
    else:
        tl.store(at, g, mask=(columns < loaded)[None, :])


@triton.jit
def add_to_rows(row_ptr, samples, inside, before, values):
    """Write a number per row [N], or add it where `before`: where blocks of columns were before."""
    found = tl.load(row_ptr + samples, mask=before, other=0.0)
    tl.debug_barrier()  # several warps may hold one row, of which one writes it
    tl.store(row_ptr + samples, found + values, mask=inside)


@triton.jit
def absolute_scale(scale_ptr, inverse_temperature):
    """|c| log2 e, |c| and the sign of c = scale / temperature."""
    c = tl.load(scale_ptr).to(tl.float32) * inverse_temperature
    sign = tl.where(c < 0, -1.0, 1.0)
    return tl.abs(c) * 1.4426950408889634, tl.abs(c), sign
