"""The outcome of a case, and that of plain PyTorch in chunks of rows where it would be too large.

Every loss is a mean over rows, and a row needs no logits but its own (of the losses over pairs, its
own of both directions). So a large case is the sum of its chunks, and gradients add up too.
"""

from __future__ import annotations

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


def upstream_of(value: Tensor, inputs: Inputs) -> Tensor | None:
    """The gradient of a loss: of a matrix that of the inputs, of rows numbers of both signs."""
    if value.ndim == 1:
        return torch.linspace(-1.5, 2, len(value), dtype=value.dtype, device=value.device)
    return inputs.upstream


def outcome(loss: Loss, inputs: Inputs, **options: Any) -> Outcome:
    """Run once without autograd and once with it.

    Args:
        options: of the loss, beside those of the inputs.
    """
    with torch.no_grad():
        alone = inputs.call(loss, **options)
    value = inputs.call(loss, **options)
    leaves, upstream = inputs.leaves, upstream_of(value, inputs)
    gradients = torch.autograd.grad(value, list(leaves.values()), upstream)
    return {"loss": value.detach(), "loss without autograd": alone} | {
        f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)
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
    return {"loss": total, "loss without autograd": total} | {
        f"gradient of {name}": sum_.to(leaf.dtype)
        for (name, leaf), sum_ in zip(inputs.leaves.items(), sums, strict=True)
    }


def _part_of_mean(case: Case, arguments: tuple[Any, ...], rows: slice) -> Tensor:
    """What these rows add to the mean over all rows."""
    x, w, scale, *rest = arguments
    if case.operator == "contrastive":
        labels = torch.arange(rows.start, rows.stop, device=x.device)
        directions = logits(x[rows], w, scale), logits(w[rows], x, scale)
        loss = sum(F.cross_entropy(z, labels) for z in directions) / 2
    elif case.operator == "siglip":
        loss = EAGER["siglip"](x[rows], w, scale, *rest, offset=rows.start)
    elif case.teachers:
        teachers, target = rest
        of_images = tuple((u[rows], v, s) for u, v, s in teachers)
        of_texts = tuple((v[rows], u, s) for u, v, s in teachers)
        if case.operator == "pair_kl":
            one = EAGER["teacher_kl_1"]
            loss = one(x[rows], w, scale, of_images, target[rows])
            loss = (loss + one(w[rows], x, scale, of_texts, target[rows])) / 2
        else:
            loss = EAGER[case.operator](x[rows], w, scale, of_images, target[rows])
    else:
        loss = EAGER[case.operator](x[rows], w, scale, rest[0][rows])
    return loss * ((rows.stop - rows.start) / case.n)
