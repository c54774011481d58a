"""`siglip`: a sigmoid of each logit, so that each block is on its own."""

from __future__ import annotations

from collections.abc import Sequence

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


class SiglipLoss:
    """The loss of `siglip`.

    Args:
        upstream: the upstream gradient of each row [N]; None for 1.
    """

    def __init__(self, x: Siglip, upstream: Tensor | None = None) -> None:
        self.models = [Products(x.image_features, x.text_features)]
        self._x, self._upstream = x, upstream
        self._losses = x.logit_scale.new_zeros(len(x.image_features))

    def block(self, u: Tensor, rows: slice, columns: slice, with_g: bool) -> Tensor:
        """Add the losses of a block and return its G, given its unscaled logits, written over."""
        u.mul_(self._x.logit_scale).add_(self._x.logit_bias)
        # -y u, and its sigmoid -y dL/du.
        of_pairs = diagonal(u, rows, columns, self._x.offset)
        of_pairs.neg_()
        self._losses[rows].add_(_losses(u, with_g))
        of_pairs.neg_()
        if with_g and self._upstream is not None:
            u.mul_(self._upstream[rows].unsqueeze(1))
        return u

    def bound(self) -> Tensor | None:
        return results.bound(self._x.image_features, self._upstream)

    def finished(self) -> tuple[Tensor, Sequence[Tensor]]:
        return self._losses, ()


def run(loss: SiglipLoss, operator: Operator, x: Siglip, request: Request) -> tuple[Tensor, ...]:
    """The results of an operator, whose loss this is."""
    count = results.rows_of_mean(operator, x, request)
    gain = results.upstream_of_all(x, request, count)
    gradients = Gradients(loss.models[0], request, x.logit_scale, gain, loss.bound())
    to_bias = request.wanted[3]
    blocks = Blocks.of(loss.models, _COPIES, gradients.any)
    logits = Logits(loss.models, blocks, 1)
    of_bias = torch.zeros_like(x.logit_bias)
    for rows in blocks.rows:
        for columns in blocks.columns:
            u = logits.of(rows, columns)[0][0]
            g = loss.block(u, rows, columns, gradients.any or to_bias)
            if to_bias:
                of_bias += g.sum()
            if gradients.any:
                gradients.add(g, rows, columns)
    found = gradients.finished()
    found.append(of_bias * gain if to_bias else of_bias.new_empty(0))
    return results.returned(request, count, *loss.finished(), found)
