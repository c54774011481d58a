# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""similarity: z_ij = scale a_i (x_i . w_j) b_j [N, P]; a = b = 1, or the inverse row norms.

    X [N, D], W [P, D]; a_i = 1 / max(|x_i|, 1e-12) where rows are normalised, b likewise

One launch. A program makes a tile of X W^T, and adds up the squares of the rows that it loads for
it. It multiplies the tile by the norms and the scale in float32, and writes it in the dtype of X:
no normalised row is rounded, and z is rounded once.

Gradients are two products with the upstream gradient G, and plain PyTorch. With u = a x and A =
G (b W): ds = sum_i <u_i, A_i>, dx = s a (A - u <u, A>), without the last term unless normalised.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from mulki.ops import reference
from mulki.ops.operators import OPERATORS, Request
from mulki.ops.similarity import SimilarityMatrix

from .gradients import multiply
from .tiles import Operands, ceil_div, jit_kernel, new_float32, tile_of


@jit_kernel
def similarity_tiles(
    operands,  # see `Operands`
    z_ptr,  # [N, P] in the dtype of X
    n,
    p,
    NORMALIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE.rows
    BLOCK_P: tl.constexpr = TILE.columns
    DEPTH: tl.constexpr = TILE.depth
    PRECISION: tl.constexpr = TILE.precision
    parts = tl.cdiv(p, BLOCK_P)
    rows = tl.program_id(0) // parts * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) % parts * BLOCK_P + tl.arange(0, BLOCK_P)
    steps = tl.arange(0, DEPTH)
    x_rows = tl.minimum(rows, n - 1).to(tl.int64)[:, None] * operands.x_strides[0]
    w_rows = tl.minimum(columns, p - 1).to(tl.int64)[None, :] * operands.w_strides[0]
    x_ptrs = operands.x[0] + x_rows + steps[None, :]
    w_ptrs = operands.w[0] + w_rows + steps[:, None]
    z = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    of_x, of_w = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_P], tl.float32)
    for k in range(0, operands.widths[0], DEPTH):
        inside = k + steps < operands.widths[0]
        x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        if TILE.upcast:
            x, w = x.to(tl.float32), w.to(tl.float32)
        z = tl.dot(x, w, z, input_precision=PRECISION)
        if NORMALIZE:
            x, w = x.to(tl.float32), w.to(tl.float32)
            of_x += tl.sum(x * x, 1)
            of_w += tl.sum(w * w, 0)
        x_ptrs += DEPTH
        w_ptrs += DEPTH
    if NORMALIZE:
        z = z * (1.0 / tl.maximum(tl.sqrt(of_x), 1e-12))[:, None]
        z = z * (1.0 / tl.maximum(tl.sqrt(of_w), 1e-12))[None, :]
    z *= tl.load(operands.scales[0]).to(tl.float32)
    at = z_ptr + rows.to(tl.int64)[:, None] * p + columns[None, :]
    tl.store(at, z.to(z_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (columns < p)[None, :])


def similarity(x: SimilarityMatrix, request: Request) -> tuple[Tensor, ...]:
    """The matrix in the dtype of the features, or its gradients."""
    n, p = len(x.features), len(x.prototypes)
    if 0 in (n, p):
        return reference.run(OPERATORS["similarity"], x, request)
    if request.grad is not None:
        return x.features.new_empty(0), *_gradients(x, request, request.grad)
    z = x.features.new_empty((n, p))
    operands = Operands.of((x.features,), (x.prototypes,), (x.scale,))
    tile = tile_of(operands, n)
    similarity_tiles[(ceil_div(n, tile.rows) * ceil_div(p, tile.columns),)](
        operands, z, n, p, x.normalize, tile, **tile.options()
    )
    return z, *(x.scale.new_empty(0) for _ in range(3))


def _gradients(x: SimilarityMatrix, request: Request, grad: Tensor) -> list[Tensor]:
    leaves, found = x[:2], [leaf.new_empty(0) for leaf in x[:3]]
    norms = [torch.linalg.vector_norm(v, dim=1, keepdim=True, dtype=torch.float32) for v in leaves]
    inverse = [1 / v.clamp(1e-12) if x.normalize else torch.ones_like(v) for v in norms]
    for i, g in enumerate((grad.to(x.features.dtype), grad.to(x.features.dtype).mT)):
        with_scale = i == 0 and request.wanted[2]
        if request.wanted[i] or with_scale:
            a, other = new_float32(leaves[i], *leaves[i].shape), leaves[1 - i]
            multiply(g, (other * inverse[1 - i]).to(other.dtype) if x.normalize else other, a)
            u = leaves[i] * inverse[i]
            along = (u * a).sum(1, keepdim=True)
            if with_scale:
                found[2] = along.sum().to(x.scale.dtype)
            if x.normalize:  # a row shorter than the shortest is divided by a constant
                a = (a - u * along.masked_fill(norms[i] < 1e-12, 0)).mul_(inverse[i])
            found[i] = a.mul_(x.scale).to(leaves[i].dtype) if request.wanted[i] else found[i]
    return found
