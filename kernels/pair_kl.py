"""pair_kl: the distillation of N pairs in both directions, over rows and over columns.

    loss_i = weight/2 (sum_k w_ik KL_ik of row i + the same of column i)
             + label_weight contrastive_i

w are of rows and of columns apart. `pairs` computes both losses, one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import common, pairs, results
from .common import Model
from .row_softmax import Numbers

if TYPE_CHECKING:
    from mulki.ops.operators import Request
    from mulki.ops.pair_kl import PairKl


def pair_kl(x: PairKl, request: Request) -> tuple[Tensor, ...]:
    leaves, n, k = x[:3], len(x.image_features), len(x.teacher_image_features)
    if n == 0:
        return results.of_nothing(request, leaves, (0,), [(2, 0, k)] * 3 + [(0,)])
    student = x.image_features, x.text_features
    of_teachers = zip(x.teacher_image_features, x.teacher_text_features, strict=True)
    models = [Model.of(images, texts) for images, texts in (student, *of_teachers)]
    teachers = pairs.Teachers(
        common.as_float32(torch.stack(list(x.teacher_scales))),
        Numbers.of_kl(x),
        None if x.weights is None else common.as_float32(x.weights),
        x.gate_label != 0,
        [common.empty_float32(x.image_features, 2, n, k) for _ in range(3)],
    )
    found = pairs.compute(models, x.logit_scale, request, leaves, False, teachers)
    loss, *details, dx, dw, ds = (
        one if place in (1, 2, 3) or x.weight == 1 else one * x.weight
        for place, one in enumerate(found)
    )
    gradients = [dx, dw, ds]
    labels = loss.new_empty(0)
    if x.label_weight != 0:
        added = pairs.compute(models[:1], x.logit_scale, request, leaves, labels=True)
        added = tuple(one * x.label_weight for one in added)
        loss = loss + added[0]
        gradients = [one + other for one, other in zip(gradients, added[1:], strict=True)]
        if request.grad is None:
            rows = request._replace(reduction="none", wanted=[False] * 3)
            labels = pairs.compute(models[:1], x.logit_scale, rows, leaves, labels=True)[0]
    return loss, *details, labels, *gradients
