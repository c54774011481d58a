"""`similarity`, the operator whose result is the matrix: z_ij = s a_i (x_i . w_j) b_j.

a and b are 1, or the inverse lengths of the rows, which are factors of the products, so that no
normalised row is rounded. Given G and A = G (b W), with u = a x:

    ds = sum_i <u_i, A_i>, dx = s A, or s a (A - u <u, A>) of normalised rows

dW likewise of B = (a G)^T X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mulki.ops.chunked.blocks import LEAST_ROWS, Blocks, Logits, cut
from mulki.ops.chunked.products import LARGEST, Products, budget
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
    a, b = by_a, by_b = (None, None) if inverse is None else inverse
    of_x = x.features.new_empty(x.features.shape if to_x or to_scale else 0, dtype=model.dtype)
    of_w = x.prototypes.new_empty(x.prototypes.shape if to_w else 0, dtype=model.dtype)
    dtype = model.dtype if model.is_cast else x.features.dtype
    factors: list[Tensor | float] = [1.0, 1.0]
    if a is not None and b is not None and dtype == torch.float16:
        # Lengths can make G larger than float16 can be, or as good as zero.
        norm = torch.linalg.vector_norm(request.grad, torch.inf, dtype=model.dtype)
        largest = norm.nan_to_num(0.0, 0.0)
        # A row of zeros adds nothing to a product with it.
        by_a, by_b = (each.masked_fill(each >= 1 / _SHORTEST, 0) for each in (a, b))
        factors = [LARGEST / (largest * each.amax()).clamp(min=1e-30) for each in (by_b, by_a)]

    def rounded(g: Tensor, lengths: Tensor | None, factor: Tensor | float) -> Tensor:
        return g.to(dtype) if lengths is None else (g * lengths).mul_(factor).to(dtype)

    for rows in blocks.rows:
        for columns in blocks.columns:
            g = request.grad[rows, columns]
            if to_x or to_scale:
                of_columns = None if by_b is None else by_b[columns].mT
                scaled = rounded(g, of_columns, factors[0])
                model.of_x(scaled, columns, of_x[rows], columns.start > 0)
                del scaled
            if to_w:
                scaled = rounded(g, None if by_a is None else by_a[rows], factors[1])
                model.of_w(scaled, rows, of_w[columns], rows.start > 0)
                del scaled
    of_scale = x.scale.new_zeros(())
    results = []
    # An eighth of the memory, for a row and what is computed of it.
    of_row = max(x.features.shape[1], 1) * model.dtype.itemsize
    step = max(budget(x.features.device.type) // (8 * of_row), LEAST_ROWS)
    of_both = (of_x, x.features, a, to_x), (of_w, x.prototypes, b, to_w)
    for (of, leaf, lengths, want), factor in zip(of_both, factors, strict=True):
        to = leaf.new_empty(leaf.shape if want else 0)
        adds = to_scale and of is of_x
        for part in cut(len(leaf), step) if want or adds else ():
            found = of[part] if lengths is None else of[part].div_(factor)
            if adds or lengths is not None:
                u = leaf[part] if lengths is None else leaf[part] * lengths[part]
                along = (u * found).sum(1, keepdim=True)
                if adds:
                    of_scale += along.sum()
                if lengths is not None:
                    # A row shorter than the shortest is divided by a constant.
                    along.masked_fill_(lengths[part] >= 1 / _SHORTEST, 0)
                    found.sub_(u.mul_(along)).mul_(lengths[part])
            if want:
                torch.mul(found, x.scale, out=to[part])
        results.append(to)
    return [*results, of_scale if to_scale else of_scale.new_empty(0)]
