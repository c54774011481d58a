"""The outcome of a case, and that of plain PyTorch in chunks of rows where it would be too large.

Every loss is a mean over rows, and a row needs no logits but its own (of the contrastive loss, its
own of both directions). So a large case is the sum of its chunks, and gradients add up too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.bench.cases import Case, Inputs
from mulki.bench.losses import EAGER, Loss, logits

#: The outcomes by name: the loss, again without autograd, and the gradient of each leaf.
Outcome = dict[str, Tensor]

#: The most logits of a chunk: half a gigabyte in float64.
CHUNK_LOGITS = 1 << 26


def outcome(loss: Loss, inputs: Inputs) -> Outcome:
    """Run once without autograd and once with it."""
    with torch.no_grad():
        alone = loss(*inputs.arguments)
    value = loss(*inputs.arguments)
    gradients = torch.autograd.grad(value, list(inputs.leaves.values()), inputs.upstream)
    return named(alone, value.detach(), gradients, inputs)


def named(alone: Tensor, value: Tensor, gradients: Sequence[Tensor], inputs: Inputs) -> Outcome:
    """What was computed without autograd and with it, by name."""
    return {"loss": value, "loss without autograd": alone} | {
        f"gradient of {name}": g for name, g in zip(inputs.leaves, gradients, strict=True)
    }


def in_chunks(case: Case, inputs: Inputs, most: int = CHUNK_LOGITS) -> Outcome:
    """The outcome of plain PyTorch, of chunks of at most `most` logits (of a loss)."""
    step = max(1, most // case.p)
    if step >= case.n or case.operator == "similarity":
        return outcome(EAGER[case.operator], inputs)
    leaves = list(inputs.leaves.values())
    # Sums of many chunks are rounded once.
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=case.device)
    sums = [torch.zeros_like(leaf, dtype=wide) for leaf in leaves]
    for first in range(0, case.n, step):
        part = _part_of_mean(case, inputs.arguments, slice(first, min(first + step, case.n)))
        total += part.detach()
        for sum_, gradient in zip(sums, torch.autograd.grad(part, leaves), strict=True):
            sum_ += gradient
    rounded = [sum_.to(leaf.dtype) for sum_, leaf in zip(sums, leaves, strict=True)]
    return named(total, total, rounded, inputs)


def _part_of_mean(case: Case, arguments: tuple[Any, ...], rows: slice) -> Tensor:
    """What these rows add to the mean over all rows."""
    count = rows.stop - rows.start
    if case.operator == "contrastive":
        x, w, scale = arguments
        labels = torch.arange(rows.start, rows.stop, device=x.device)
        directions = logits(x[rows], w, scale), logits(w[rows], x, scale)
        loss = sum(F.cross_entropy(z, labels) for z in directions) / 2
    elif case.operator == "pair_kl":
        x, w, scale, teachers, target = arguments
        ((u, v, s),) = teachers
        sides = ((x, w, u, v), (w, x, v, u))
        loss = (
            sum(
                EAGER["teacher_kl_1"](a[rows], b, scale, ((c[rows], d, s),), target[rows])
                for a, b, c, d in sides
            )
            / 2
        )
    elif case.operator == "siglip":
        x, w, scale, bias = arguments
        z = logits(x[rows], w, scale) + bias
        signs = torch.full_like(z, -1)
        signs.diagonal(rows.start).fill_(1)
        loss = -F.logsigmoid(signs * z).sum() / count
    else:
        x, w, scale, *rest = arguments
        if case.teachers:
            teachers, target = rest
            others = tuple((u[rows], v, s) for u, v, s in teachers)
            loss = EAGER[case.operator](x[rows], w, scale, others, target[rows])
        else:
            loss = EAGER[case.operator](x[rows], w, scale, rest[0][rows])
    return loss * (count / case.n)
