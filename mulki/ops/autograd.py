"""Gradients of the operators, by one rule; csrc/autograd.cpp has it in C++ for small calls.

Beside a sum or a mean an operator returns its gradients; the backward pass multiplies them, out of
place, by an upstream gradient, which on a GPU is not read on the host. On the CPU, where it is 1
and nothing needs the graph after this backward pass, the gradients are handed over as they are. For
a loss per row the operator is called again, with the upstream gradient. The loss is differentiable,
the details behind it are not. A gradient has no gradient of its own: asking for one raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from mulki.ops import torch_private
from mulki.ops.namespaces import PUBLIC, SCALED, TAGS
from mulki.ops.operators import Operator

_OPS = torch.ops.mulki


def register(operator: Operator, factor_of_weights: Callable[[Any], float] | None) -> None:
    """Give an operator its gradients.

    Args:
        factor_of_weights: see `mulki.ops.registry.define`.
    """
    fields, leaves = operator.arguments._fields, operator.leaves
    hints = get_type_hints(operator.arguments)
    lists = [i for i, field in enumerate(fields) if hints[field] == Sequence[Tensor]]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, request = operator.split(inputs)
        ctx.set_materialize_grads(False)
        ctx.lists = {i: len(x[i]) for i in lists}
        ctx.is_gradient = request.grad is not None
        if ctx.is_gradient:
            return
        ctx.mark_non_differentiable(*output[1:])
        ctx.reduction = request.reduction
        ctx.rows = x[0].shape[0] if request.reduction == "mean" else 1
        ctx.factor = None
        if factor_of_weights is not None and x.weights is not None:
            ctx.factor = factor_of_weights(x)
        kept = x
        if request.reduction != "none":
            # For their shapes and dtypes alone.
            kept = [leaf if leaf.requires_grad else None for leaf in x[:leaves]]
        of_weights = (None, None) if ctx.factor is None else (x.weights, output[1])
        _save(ctx, [*output[-leaves:], *of_weights, *kept])

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if ctx.is_gradient:
            raise RuntimeError(_refusal(f"mulki::{operator.name}"))
        result: list[Any] = [None] * (len(fields) + 3)
        for i, length in ctx.lists.items():
            result[i] = [None] * length
        if grad is None:
            return tuple(result)
        stored, (weights, divergence), x = _parts(_saved(ctx), leaves, leaves + 2)
        needed = list(ctx.needs_input_grad[:leaves])
        if not any(needed):
            found: Any = [None] * leaves
        elif ctx.reduction == "none":
            found = getattr(_OPS, operator.name)(*x, grad, "none", needed)[-leaves:]
        else:
            _check_stored(operator.name, x, stored, needed)
            found = _multiplied(grad, x, stored, needed, weights)
        result[:leaves] = [one if want else None for one, want in zip(found, needed, strict=True)]
        if ctx.factor is not None and ctx.needs_input_grad[fields.index("weights")]:
            of_rows = ctx.factor * grad
            of_rows = of_rows.unsqueeze(-1) if ctx.reduction == "none" else of_rows / ctx.rows
            tie = _tie([*x[:leaves], weights])
            result[fields.index("weights")] = _times(of_rows, divergence, weights, tie)
        return tuple(result)

    torch.library.register_autograd(
        f"mulki::{operator.name}", backward, setup_context=setup_context, lib=PUBLIC
    )


def _save(ctx: Any, values: Sequence[Any]) -> None:
    # Tensors as autograd keeps them, also those in lists. Inference tensors, as frozen prototypes
    # and teachers may be, cannot be saved, but a copy can.
    ctx.plain = None
    if all(one is None or (isinstance(one, Tensor) and not one.is_inference()) for one in values):
        ctx.save_for_backward(*values)
        return
    ctx.plain = [list(value) if isinstance(value, (list, tuple)) else [value] for value in values]
    ctx.is_list = [isinstance(value, (list, tuple)) for value in values]
    ctx.at = []
    tensors = []
    for i, of_value in enumerate(ctx.plain):
        for j, value in enumerate(of_value):
            if isinstance(value, Tensor):
                ctx.at.append((i, j))
                tensors.append(value.clone() if value.is_inference() else value)
                of_value[j] = None
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> list[Any]:
    if ctx.plain is None:
        return list(ctx.saved_tensors)
    values = [list(of_value) for of_value in ctx.plain]
    for (i, j), tensor in zip(ctx.at, ctx.saved_tensors, strict=True):
        values[i][j] = tensor
    return [v if is_list else v[0] for v, is_list in zip(values, ctx.is_list, strict=True)]


def _parts(values: list[Any], *ends: int) -> list[list[Any]]:
    return [values[i:j] for i, j in zip((0, *ends), (*ends, len(values)), strict=True)]


def _check_stored(op: str, leaves: list[Tensor], stored: list[Tensor], needed: list[bool]) -> None:
    for i, (leaf, gradient, want) in enumerate(zip(leaves, stored, needed, strict=False)):
        if want and gradient.shape != leaf.shape:
            raise RuntimeError(
                f"wanted[{i}]: got False for mulki::{op}, wanted True as the argument requires "
                "grad; where torch.export or make_fx recorded the call, record it again with "
                "inputs that require grad"
            )


def _multiplied(
    grad: Tensor,
    leaves: list[Tensor],
    stored: list[Tensor],
    needed: list[bool],
    weights: Tensor | None,
) -> list[Tensor | None]:
    # The stored gradients of leaves times the upstream gradient, in the leaves' dtypes.
    give_away, tie = _may_give_away(grad), _tie([*leaves, weights])

    def product(leaf: Tensor, gradient: Tensor) -> Tensor:
        return gradient.to(leaf.dtype) if give_away else _times(grad, gradient, leaf, tie)

    found = zip(leaves, stored, needed, strict=True)
    return [product(leaf, gradient) if want else None for leaf, gradient, want in found]


def _may_give_away(grad: Tensor) -> bool:
    # Whether stored gradients may be handed over as they are: for an upstream gradient of 1.
    # Reading it would wait for a GPU.
    return (
        torch_private.is_last_plain_backward(grad)
        and grad.device.type == "cpu"
        and bool((grad == 1).all())
    )


def _tie(leaves: Sequence[Tensor | None]) -> Tensor | None:
    # Zero, which depends on all leaves, for a backward pass with a graph: so a second derivative by
    # any of them is refused, and is not zero.
    if not torch.is_grad_enabled():
        return None
    tied = (one for one in leaves if one is not None and one.requires_grad)
    return sum((one.unsqueeze(0)[:0].sum().float() for one in tied), torch.zeros(()))


def _times(grad: Tensor, stored: Tensor, leaf: Tensor, tie: Tensor | None) -> Tensor:
    # grad * stored in the dtype of the leaf.
    # Plain multiplication would go into a graph as if what is stored were a constant.
    if tie is not None:
        product: Tensor = _OPS.scaled(grad, stored, leaf, tie)
        return product
    if stored.dtype == leaf.dtype == grad.dtype:
        return stored * grad
    # One launch without a float32 copy. A transform cannot write to a given tensor, and a compiler
    # makes one launch of both operations itself.
    if torch_private.is_plain(grad):
        return scaled(grad, stored, leaf)
    return (stored.to(grad.dtype) * grad).to(leaf.dtype)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, total: Tensor, g: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(g, *leaves)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, *leaves = ctx.saved_tensors
        return _times(grad, g, g, _tie(leaves)), *(None,) * (2 + len(leaves))


def known(z: Tensor, total: Tensor, g: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """`total`, whose gradient by the logits z is g; z is made of these leaves."""
    found: Tensor = _Known.apply(z, total, g, *leaves)  # type: ignore[no-untyped-call]
    return found


def refuse_double_backward(op: str, what: str) -> None:
    """Make the gradient of `op`, which is itself a gradient of `what`, an error."""

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_refusal(what))

    torch.library.register_autograd(f"mulki::{op}", backward, lib=PUBLIC)


def _refusal(what: str) -> str:
    return (
        f"double backward of {what} is not supported; use the operator's `reference` in mulki.ops, "
        f"which is plain PyTorch"
    )


def scaled(grad: Tensor, stored: Tensor, like: Tensor) -> Tensor:
    """grad * stored in the dtype of `like`, by one operation, and rounded once."""
    if grad.ndim == 0:  # a number would be rounded to the dtype of `stored` first
        grad = grad.reshape((1,) * stored.ndim)
    return torch.mul(stored, grad, out=torch.empty_like(stored, dtype=like.dtype))


def _scaled_fake(grad: Tensor, stored: Tensor, like: Tensor, tie: Tensor) -> Tensor:
    return torch.empty_like(stored, dtype=like.dtype)


PUBLIC.define(SCALED, tags=TAGS)
PUBLIC.impl(
    "scaled",
    lambda grad, stored, like, tie: scaled(grad, stored, like),
    "CompositeExplicitAutograd",
)
torch.library.register_fake("mulki::scaled", _scaled_fake, lib=PUBLIC)
refuse_double_backward("scaled", "a loss of mulki")
