"""contrastive: loss_i = 1/2 (log sum_j exp u_ij + log sum_j exp u_ji) - u_ii, u = scale X W^T.

It is the labels' loss of `pairs`, which computes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import pairs, results
from .common import Model

if TYPE_CHECKING:
    from mulki.ops.contrastive import Contrastive
    from mulki.ops.operators import Request


def contrastive(x: Contrastive, request: Request) -> tuple[Tensor, ...]:
    if len(x.image_features) == 0:
        return results.of_nothing(request, x, (0,))
    models = [Model.of(x.image_features, x.text_features)]
    return pairs.compute(models, x.logit_scale, request, x, labels=True)
