"""The operators in plain PyTorch, a block of logits at a time: bounded memory on any device.

`blocks` cuts [N, P] into blocks, `products` multiplies, and a file per family has what is computed
of a block's logits: `rows` (softmax of rows), `pairs` (of rows and of columns) and `sigmoids`.
Where one block holds all logits, a loss in training is its formula. Nothing waits for the device,
no argument is written to, and results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mulki.ops import reference
from mulki.ops.arguments import savable
from mulki.ops.chunked import pairs, products, results, rows, sigmoids
from mulki.ops.operators import Arguments, Operator, Request


class _Family(NamedTuple):
    loss: Callable[..., Any]  # from the arguments and the upstream gradients of rows to a loss
    run: Callable[..., tuple[Tensor, ...]]


_FAMILIES = {
    "teacher_kl": _Family(rows.TeacherKlLoss, rows.run),
    "prototype_cross_entropy": _Family(rows.CrossEntropyLoss, rows.run),
    "contrastive": _Family(pairs.ContrastiveLoss, pairs.run),
    "pair_kl": _Family(pairs.PairKlLoss, pairs.run),
    "siglip": _Family(sigmoids.SiglipLoss, sigmoids.run),
}


def run(operator: Operator, x: Arguments, request: Request) -> tuple[Tensor, ...]:
    """The results of an operator; of one that no family has, its reference's."""
    family = _FAMILIES.get(operator.name)
    if family is None:
        return reference.run(operator, x, request)
    return family.run(family.loss(x, results.upstream_of_rows(request)), operator, x, request)


# Copies of the logits that a formula and its gradient keep.
_COPIES = 4


def at_once(
    operator: Operator, x: Arguments, reduction: str, details: bool
) -> tuple[Tensor, ...] | None:
    """The sum or the mean of a loss, differentiable, and the details; None where blocks are needed.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    operator.check(x)
    features = x[0]
    if features.dtype == torch.float16 and not features.is_cpu:
        return None  # it has too few small numbers for a gradient
    models = 1
    for value in x[3:4]:
        if isinstance(value, (list, tuple)):  # the features of teachers
            models += len(value)
    n, p = features.shape[0], x[1].shape[0]
    if n == 0 or _COPIES * 4 * models * n * p > products.budget(features.device.type):
        return None
    return operator.formula(operator.arguments(*map(savable, x)), reduction, details)
