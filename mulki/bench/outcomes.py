"""What comes of a case: its loss, with autograd and without, and the gradient of each leaf."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mulki.bench.cases import Inputs
from mulki.bench.losses import Loss

#: By name.
Outcome = dict[str, Tensor]


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
