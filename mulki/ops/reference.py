"""Serves any operator by its reference: the formula in plain PyTorch, and autograd's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mulki.ops import torch_private
from mulki.ops.logits import waiting, wide
from mulki.ops.operators import Arguments, Operator, Request


def run(operator: Operator, x: Arguments, request: Request) -> tuple[Tensor, ...]:
    """The results of an operator."""
    grad, reduction, wanted = request
    leaves, rest = x[: operator.leaves], x[operator.leaves :]
    count = None
    if reduction == "mean":
        count = torch.as_tensor(operator.averaged(x), device=x[0].device)

    def loss_of(*leaves: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows, *details = operator.reference(operator.arguments(*leaves, *rest))
        total = rows if reduction == "none" else rows.sum(dim=-1)
        # The mean over no rows has a gradient, zero.
        return total if count is None else total / torch.clamp(count, min=1), tuple(details)

    dtypes = [waiting(leaf) if grad is None else leaf.dtype for leaf in leaves]
    gradients = [leaf.new_empty(0, dtype=d) for leaf, d in zip(leaves, dtypes, strict=True)]
    if not any(wanted):
        loss, details = loss_of(*leaves)
    else:
        if grad is None:
            leaves = tuple(leaf.to(wide(leaf.dtype)) for leaf in leaves)
        # Inference tensors cannot be kept for a backward pass.
        with torch.inference_mode(False):
            leaves = tuple(leaf.clone() if leaf.is_inference() else leaf for leaf in leaves)
        asked = [i for i, want in enumerate(wanted) if want]

        def of_asked(*given: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            values = list(leaves)
            for i, leaf in zip(asked, given, strict=True):
                values[i] = leaf
            return loss_of(*values)

        loss, pull, details = torch_private.vjp(of_asked, *(leaves[i] for i in asked))
        found = pull(torch.ones_like(loss) if grad is None else grad.to(loss.dtype))
        for i, gradient in zip(asked, found, strict=True):
            gradients[i] = gradient.to(dtypes[i]).contiguous()
    if count is not None:
        loss = loss / torch.clamp(count, max=1)
    if grad is not None:
        # Gradients alone.
        loss, details = loss.new_empty(0), tuple(one.new_empty(0) for one in details)
    return loss, *details, *gradients


def at_once(operator: Operator, x: Arguments, reduction: str, details: bool) -> None:
    """Nothing: the reference is for tests, and always called as an operator."""
