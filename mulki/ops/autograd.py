"""Gradients of the operators.

A row operator keeps its arguments and calls its `_backward` operator, which computes the logits
again. A `_reduced` operator has its gradients already; its backward multiplies them, out of place,
by an upstream gradient, which on a GPU is not read on the host. On the CPU, where it is 1 and the
graph goes with this backward pass, the gradients are handed over as they are. The first result is
differentiable, the by-products behind it are not. A gradient has no gradient of its own: asking for
one raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mulki.ops import backends, torch_private
from mulki.ops.registry import TAGS, library
from mulki.ops.torch_private import Gradients, Keep

_OPS = torch.ops.mulki


def register(op: str, leaves: Sequence[int], keep: Keep, gradients: Gradients) -> None:
    """Give an operator its gradients.

    Args:
        leaves: positions of the arguments that have gradients.
        keep: saves for the backward what it needs of inputs and outputs; see `save`.
        gradients: from the upstream gradient of the first output to gradients by position.
    """
    kernel = partial(backends.call, op)
    torch_private.register_autograd(library, op, kernel, leaves, keep, gradients)


def register_rows(op: str, leaves: int) -> None:
    """Gradients of an operator with a loss per row, whose first arguments are the leaves."""
    backward = getattr(_OPS, f"{op}_backward").default

    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        save(ctx, (*inputs, *outputs[1:]))

    def gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
        wanted = list(ctx.needed[:leaves])
        return asked(wanted, backward(grad, *saved(ctx), wanted))

    register(op, range(leaves), keep, gradients)
    refuse_double_backward(f"{op}_backward")


def register_reduced(op: str, leaves: int) -> None:
    """Gradients of an operator that returns them with its sum or mean, as its last results."""

    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        save(ctx, (*inputs[:leaves], *outputs[-leaves:]))

    def gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
        values = saved(ctx)
        return multiplied(op, ctx, grad, values[:leaves], values[leaves:])

    register(op, range(leaves), keep, gradients)


def save(ctx: Any, values: Sequence[Any]) -> None:
    """Keep values for the backward, tensors among them as autograd saves them."""
    # Inference tensors, as frozen prototypes and teachers may be, cannot be saved, only kept.
    at = [i for i, v in enumerate(values) if isinstance(v, Tensor) and not v.is_inference()]
    ctx.save_for_backward(*(values[i] for i in at))
    ctx.tensors_at = at
    ctx.plain = list(values)
    for i in at:
        ctx.plain[i] = None


def saved(ctx: Any) -> list[Any]:
    """What `save` was given."""
    values = list(ctx.plain)
    for i, tensor in zip(ctx.tensors_at, ctx.saved_tensors, strict=True):
        values[i] = tensor
    return values


def asked(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> dict[int, Tensor]:
    """The gradients that are wanted, by position."""
    return {i: g for i, (want, g) in enumerate(zip(wanted, gradients, strict=True)) if want}


def multiplied(
    op: str, ctx: Any, grad: Tensor, leaves: Sequence[Tensor], stored: Sequence[Tensor]
) -> dict[int, Tensor]:
    """The stored gradients of leaves times the upstream gradient, in the leaves' dtypes."""
    check_stored(op, ctx, leaves, stored)
    give_away = may_give_away(grad)
    return {
        i: gradient.to(leaf.dtype) if give_away else times(grad, gradient, leaf)
        for i, (leaf, gradient) in enumerate(zip(leaves, stored, strict=True))
        if ctx.needed[i]
    }


def check_stored(op: str, ctx: Any, leaves: Sequence[Tensor], stored: Sequence[Tensor]) -> None:
    """Raise a RuntimeError where the gradient of a leaf is needed and was not computed."""
    for i, (leaf, gradient) in enumerate(zip(leaves, stored, strict=True)):
        if ctx.needed[i] and gradient.shape != leaf.shape:
            raise RuntimeError(
                f"wanted[{i}]: got False for mulki::{op}, wanted True as the argument requires grad"
            )


def may_give_away(grad: Tensor) -> bool:
    """Whether stored gradients may be handed over as they are: for an upstream gradient of ones."""
    # Reading the upstream gradient would wait for a GPU.
    return (
        torch_private.is_last_plain_backward(grad)
        and grad.device.type == "cpu"
        and bool((grad == 1).all())
    )


def times(grad: Tensor, stored: Tensor, leaf: Tensor) -> Tensor:
    """grad * stored in the dtype of the leaf."""
    # Plain multiplication would go into a graph as if what is stored were a constant.
    if torch.is_grad_enabled():
        product: Tensor = _OPS.scaled(grad, stored, leaf)
        return product
    if stored.dtype == leaf.dtype:
        return stored * grad
    # One launch without a float32 copy. A transform cannot write to a given tensor, and a compiler
    # makes one launch of both operations itself.
    if torch_private.is_plain(grad):
        return _scaled(grad, stored, leaf)
    return (stored * grad).to(leaf.dtype)


def refuse_double_backward(op: str) -> None:
    """Make the gradient of `op`, itself a gradient, an error."""
    what = "a loss of mulki" if op == "scaled" else f"mulki::{op.removesuffix('_backward')}"

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"double backward of {what} is not supported; use the operator's `reference` in "
            f"mulki.ops, which is plain PyTorch"
        )

    torch.library.register_autograd(f"mulki::{op}", backward, lib=library)


def _scaled(grad: Tensor, stored: Tensor, like: Tensor) -> Tensor:
    return torch.mul(stored, grad, out=torch.empty_like(stored, dtype=like.dtype))


def _scaled_fake(grad: Tensor, stored: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=like.dtype)


# grad * stored in the dtype of `like`: the backward of an operator that stored its gradients.
library.define("scaled(Tensor grad, Tensor stored, Tensor like) -> Tensor", tags=TAGS)
library.impl("scaled", _scaled, "CompositeExplicitAutograd")
torch.library.register_fake("mulki::scaled", _scaled_fake, lib=library)
refuse_double_backward("scaled")
