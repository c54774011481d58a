"""contrastive: loss_i = 1/2 (log sum_j exp u_ij + log sum_j exp u_ji) - u_ii, u = scale X W^T.

    X, W [N, D]; G_ij = 1/2 (g_i q_ij + g_j q'_ij) - g_i [i = j], q and q' the softmax of u over
    rows and over columns, g the upstream gradients

It is the labels' loss of `pair_kl`, of no teachers.
"""

from __future__ import annotations

from torch import Tensor

from mulki.ops import reference
from mulki.ops.contrastive import Contrastive
from mulki.ops.operators import OPERATORS, Request

from .pair_kl import compute
from .teacher_kl import Numbers
from .tiles import Operands


def contrastive(x: Contrastive, request: Request) -> tuple[Tensor, ...]:
    if len(x.image_features) == 0:
        return reference.run(OPERATORS["contrastive"], x, request)
    operands = Operands.of((x.image_features,), (x.text_features,), (x.logit_scale,))
    return compute(x[:3], request, operands, Numbers(), weight=0.0, label_weight=1.0)
