"""`similarity`, the operator whose result is the matrix: z_ij = s a_i (x_i . w_j) b_j.

a and b are 1, or the inverse lengths of the rows, which are factors of the products, so that no
normalised row is rounded. Given G and A = G (b W), with u = a x:

    ds = sum_i <u_i, A_i>, dx = s A, or s a (A - u <u, A>) of normalised rows

dW likewise of B = (a G)^T X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mulki.ops.chunked.blocks import Blocks, Logits
from mulki.ops.chunked.products import Products
from mulki.ops.logits import wide
from mulki.ops.operators import Operator, Request
from mulki.ops.similarity import SimilarityMatrix

_SHORTEST = 1e-12  # of torch.nn.functional.normalize


def similarity(operator: Operator, x: SimilarityMatrix, request: Request) -> tuple[Tensor, ...]:
    """The results of `mulki.ops.similarity`."""
    model = Products(x.features, x.prototypes)
    inverse: tuple[Tensor, Tensor] | None = None
    if x.normalize:
        inverse = _inverse_lengths(x.features), _inverse_lengths(x.prototypes)
    blocks = Blocks.of([model], 1, request.grad is not None)
    if request.grad is not None:
        gradients = _gradients(x, request, model, inverse, blocks)
        return x.features.new_empty(0), *gradients
    z = x.features.new_empty(len(x.features), len(x.prototypes))
    logits = Logits([model], blocks, 1)
    for rows in blocks.rows:
        for columns in blocks.columns:
            part = logits.of(rows, columns)[0][0]
            if inverse is not None:
                part.mul_(inverse[0][rows]).mul_(inverse[1][columns].mT)
            torch.mul(part, x.scale, out=z[rows, columns])
    return z, *(x.scale.new_empty(0) for _ in range(3))


def _inverse_lengths(x: Tensor) -> Tensor:  # [rows, 1]
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide(x.dtype))
    return lengths.clamp(_SHORTEST).reciprocal()


def _gradients(
    x: SimilarityMatrix,
    request: Request,
    model: Products,
    inverse: tuple[Tensor, Tensor] | None,
    blocks: Blocks,
) -> list[Tensor]:
    assert request.grad is not None
    to_x, to_w, to_scale = request.wanted
    a, b = (None, None) if inverse is None else inverse
    of_x = x.features.new_empty(x.features.shape, dtype=model.dtype)
    of_w = x.prototypes.new_empty(x.prototypes.shape, dtype=model.dtype)
    dtype = model.dtype if model.is_cast else x.features.dtype
    for rows in blocks.rows:
        for columns in blocks.columns:
            g = request.grad[rows, columns]
            if to_x or to_scale:
                of_columns = g if b is None else g * b[columns].mT
                model.of_x(of_columns.to(dtype), columns, of_x[rows], columns.start > 0)
            if to_w:
                of_rows = g if a is None else g * a[rows]
                model.of_w(of_rows.to(dtype), rows, of_w[columns], rows.start > 0)
    of_scale = x.scale.new_zeros(())
    results = []
    for of, leaf, lengths, want in ((of_x, x.features, a, to_x), (of_w, x.prototypes, b, to_w)):
        to = leaf.new_empty(leaf.shape if want else 0)
        for part in blocks.rows if of is of_x else blocks.columns:
            u = leaf[part] if lengths is None else leaf[part] * lengths[part]
            along = (u * of[part]).sum(1, keepdim=True)
            if of is of_x:
                of_scale += along.sum()
            if want and lengths is not None:
                # A row shorter than the shortest is divided by a constant.
                along.masked_fill_(lengths[part] >= 1 / _SHORTEST, 0)
                of[part].sub_(u.mul_(along)).mul_(lengths[part])
            if want:
                torch.mul(of[part], x.scale, out=to[part])
        results.append(to)
    return [*results, of_scale if to_scale else of_scale.new_empty(0)]
