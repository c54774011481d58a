# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Device functions that several kernels call: one tile of Y = A B^T, the scale, tuples.

`row_product` computes a tile [BLOCK_A, BLOCK_B] of Y. It takes DEPTH columns of A and B per step,
one tl.dot each, and sums them in a float32 accumulator in registers. The tile is not rounded, and
nothing is written. With STORED the tile is loaded from Y, which a matrix product wrote before.
"""

import triton
import triton.language as tl

# Integer arguments that no vectorised load or store depends on. Triton compiles a kernel again for
# an integer that is 1 or a multiple of 16; for these it must not, since N and P often change.
COUNTS = (
    *(
        "n",
        "p",
        "kept_count",
        "streamed_count",
        "first",
        "last",
        "offset",
        "models",
        "splits",
        "parts",
    ),
    *("tiles_per_split", "ignore_index"),
)
jit_kernel = triton.jit(do_not_specialize=COUNTS)  # decorates the functions that are launched


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
    """The tile of Y for the given rows of A and B."""
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
def absolute_scale(scale_ptr, inverse_temperature):
    """|c| log2 e, |c| and the sign of c = scale / temperature."""
    c = tl.load(scale_ptr).to(tl.float32) * inverse_temperature
    sign = tl.where(c < 0, -1.0, 1.0)
    return tl.abs(c) * 1.4426950408889634, tl.abs(c), sign


@triton.jit
def top_change(old, new):
    """Old less new running maximum, which is at most 0; 0 where there was no old one (-inf)."""
    return tl.where(old == float("-inf"), 0.0, old - new)


@triton.jit
def tuple_replace(values, k: tl.constexpr, value):
    """The tuple with element k set to `value`."""
    out = ()
    for i in tl.static_range(len(values)):
        if i == k:
            out = out + (value,)
        else:
            out = out + (values[i],)
    return out


@triton.jit
def tuple_repeat(value, count: tl.constexpr):
    """A tuple that holds `value` `count` times."""
    out = ()
    for _ in tl.static_range(count):
        out = out + (value,)
    return out
