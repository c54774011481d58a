# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Functions of kernels: one tile of Y = A B^T, and small things about tuples and tops.

A tile is [BLOCK_A, BLOCK_B] in the float32 accumulator of one tl.dot per step of D; it is never
rounded. STORED tiles are read instead, from a block of rows of Y that a matrix product has made.
"""

import triton
import triton.language as tl

# Decorates what is launched. Of these numbers no wide load or store is made: a kernel is not
# compiled again where one of them is 1 or a multiple of 16, as N and P are now and then.
COUNTS = (
    *("n", "p", "m_own", "m_other", "first", "last", "offset", "models", "splits", "parts"),
    *("tiles_per_split", "ignore_index"),
)
entry = triton.jit(do_not_specialize=COUNTS)


@triton.jit
def row_product(
    a_ptr,  # [A, D], or where STORED [A, B] float32
    b_ptr,  # [B, D], or where STORED anything
    a_rows,  # [BLOCK_A] int64, within A
    b_rows,  # [BLOCK_B] int64, within B
    a_stride,
    b_stride,
    d,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,  # D is a multiple of DEPTH
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The tile of Y at the given rows of A and B."""
    if STORED:
        y = tl.load(a_ptr + (a_rows[:, None] * a_stride + b_rows[None, :] * b_stride))
    else:
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
def scale_of(scale_ptr, inverse_temperature):
    """|c| log2 e, |c| and the sign of c = scale / temperature."""
    c = tl.load(scale_ptr).to(tl.float32) * inverse_temperature
    sign = tl.where(c < 0, -1.0, 1.0)
    return tl.abs(c) * 1.4426950408889634, tl.abs(c), sign


@triton.jit
def moved(old, new):
    """How far a running maximum has moved down, seen from the new one; 0 before there was one."""
    return tl.where(old == float("-inf"), 0.0, old - new)


@triton.jit
def replaced(values, k: tl.constexpr, value):
    """The tuple with `value` in place k."""
    out = ()
    for i in tl.static_range(len(values)):
        if i == k:
            out = out + (value,)
        else:
            out = out + (values[i],)
    return out


@triton.jit
def repeated(value, count: tl.constexpr):
    """A tuple of `count` times the value."""
    out = ()
    for _ in tl.static_range(count):
        out = out + (value,)
    return out
