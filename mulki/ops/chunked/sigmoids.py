"""`siglip`: a sigmoid of each logit, so that each block is on its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops.chunked import results
from mulki.ops.chunked.blocks import Blocks, Logits, diagonal
from mulki.ops.chunked.compiling import compilable
from mulki.ops.chunked.products import Gradients, Products
from mulki.ops.operators import Operator, Request
from mulki.ops.siglip import Siglip

# Copies of the logits at a time: of a block, and what softplus makes of them.
_COPIES = 2
# Above it softplus is the identity, in float64 too.
_THRESHOLD = 40


@compilable
def _losses(v: Tensor, with_g: bool) -> Tensor:  # [rows]; with_g: v becomes its sigmoid
    losses = F.softplus(v, threshold=_THRESHOLD).sum(1)
    if with_g:
        v.sigmoid_()
    return losses


def siglip(operator: Operator, x: Siglip, request: Request) -> tuple[Tensor, ...]:
    """The results of `mulki.ops.siglip`."""
    model = Products(x.image_features, x.text_features)
    upstream, count = results.upstream_of_rows(request), results.rows_of_mean(operator, x, request)
    gain = results.upstream_of_all(x, request, count)
    bound = results.bound(x.image_features, upstream)
    gradients = Gradients(model, request, x.logit_scale, gain, bound)
    of_bias = request.wanted[3]
    blocks = Blocks.of([model], _COPIES, gradients.any)
    logits = Logits([model], blocks, 1)
    losses = x.logit_scale.new_zeros(len(x.image_features))
    total = torch.zeros_like(x.logit_bias)
    for rows in blocks.rows:
        for columns in blocks.columns:
            u = logits.of(rows, columns)[0][0]
            u.mul_(x.logit_scale).add_(x.logit_bias)
            # -y u, and its sigmoid -y dL/du.
            of_pairs = diagonal(u, rows, columns, x.offset)
            of_pairs.neg_()
            losses[rows].add_(_losses(u, gradients.any or of_bias))
            if not (gradients.any or of_bias):
                continue
            of_pairs.neg_()
            if upstream is not None:
                u.mul_(upstream[rows].unsqueeze(1))
            if of_bias:
                total += u.sum()
            if gradients.any:
                gradients.add(u, rows, columns)
    found = gradients.finished()
    found.append(total * gain if of_bias else total.new_empty(0))
    return results.returned(request, count, losses, (), found)
