"""Gradients of the operators.

A row operator keeps its arguments and calls its `_backward` operator, which computes the logits
again. A `_reduced` operator has its gradients already; its backward multiplies them, out of place,
by an upstream gradient, which on a GPU is not read on the host. On the CPU, where it is 1 and the
graph goes with this backward pass, the gradients are handed over as they are. The first result is
differentiable, the by-products behind it are not. A gradient has no gradient of its own: asking for
one raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mulki.ops.router import ROUTES
from mulki.ops.schemas import SCHEMAS, library

_OPS = torch.ops.mulki

# Keeps for the backward what it needs of inputs and outputs.
Keep = Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None]
# Gives the gradients by the position of their argument.
Backward = Callable[[Any, Tensor], Mapping[int, Tensor]]


def _register(op: str, leaves: Sequence[int], keep: Keep, gradients: Backward) -> None:
    """What torch.library.register_autograd does, for arguments `leaves` that have gradients.

    That function walks through schema and arguments at every call, which for the fifteen arguments
    and the lists of teacher_kl takes longer than its kernel on a small batch.
    """
    overload = getattr(_OPS, op).default
    route = ROUTES[op]

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        rest = keyset & torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            # Nothing is between here and the kernel, a mode or a transform for example: the
            # dispatcher would do the same, and takes longer for it.
            if rest.highestPriorityTypeId() == torch._C.DispatchKey.CPU:
                return route(*args)
            return overload.redispatch(rest, *args)

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        output = below(keyset, args)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        # Autograd would otherwise make zeros of the shapes of those.
        ctx.set_materialize_grads(False)
        ctx.count = 1 + len(args)
        keep(ctx, args, outputs)
        return output

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        result: list[Tensor | None] = [None] * ctx.count
        if grad is not None:
            for position, gradient in gradients(ctx, grad).items():
                result[1 + position] = gradient
        return tuple(result)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"mulki_{op}", (torch.autograd.Function,), methods)

    def differentiable(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            args[i] is not None and args[i].requires_grad for i in leaves
        ):
            return function.apply(keyset, *args)
        return below(keyset, args)

    library.impl(op, differentiable, "Autograd", with_keyset=True)


def _needed(ctx: Any, position: int) -> bool:
    return ctx.needs_input_grad[1 + position]


def _save(ctx: Any, values: Sequence[Any]) -> None:
    # Inference tensors, as frozen prototypes and teachers may be, cannot be saved, only kept.
    at = [i for i, v in enumerate(values) if isinstance(v, Tensor) and not v.is_inference()]
    ctx.save_for_backward(*(values[i] for i in at))
    ctx.tensors_at = at
    ctx.plain = list(values)
    for i in at:
        ctx.plain[i] = None


def _saved(ctx: Any) -> list[Any]:
    values = list(ctx.plain)
    for i, tensor in zip(ctx.tensors_at, ctx.saved_tensors, strict=True):
        values[i] = tensor
    return values


def _where(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> dict[int, Tensor]:
    return {i: g for i, (asked, g) in enumerate(zip(wanted, gradients, strict=True)) if asked}


def _row_operator(op: str, leaves: int) -> None:
    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        _save(ctx, (*inputs, *outputs[1:]))

    def gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
        wanted = [_needed(ctx, i) for i in range(leaves)]
        backward = getattr(_OPS, f"{op}_backward").default
        return _where(wanted, backward(grad, *_saved(ctx), wanted))

    _register(op, range(leaves), keep, gradients)


def _reduced_operator(op: str, leaves: int) -> None:
    def keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        _save(ctx, (*inputs[:leaves], *outputs[-leaves:]))

    def gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
        saved = _saved(ctx)
        return _scaled(op, ctx, grad, saved[:leaves], saved[leaves:])

    _register(op, range(leaves), keep, gradients)


def _scaled(
    op: str, ctx: Any, grad: Tensor, leaves: Sequence[Tensor], stored: Sequence[Tensor]
) -> dict[int, Tensor]:
    result = {}
    as_it_is = _handed_over(grad)
    for i, (leaf, gradient) in enumerate(zip(leaves, stored, strict=True)):
        if _needed(ctx, i):
            if gradient.shape != leaf.shape:
                raise RuntimeError(
                    f"wanted[{i}]: got False for mulki::{op}, wanted True as the argument "
                    f"requires grad"
                )
            result[i] = gradient.to(leaf.dtype) if as_it_is else _times(grad, gradient, leaf)
    return result


def _handed_over(grad: Tensor) -> bool:
    return (
        # Compiled autograd makes one graph of this function, where what follows would break it.
        not torch.compiler.is_compiling()
        and type(grad) is Tensor
        and grad.device.type == "cpu"
        # Nothing traces, batches or differentiates this backward pass, and there is no other one.
        and not torch.is_grad_enabled()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(grad)
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
        and grad.item() == 1
    )


def _times(grad: Tensor, stored: Tensor, leaf: Tensor) -> Tensor:
    # Plain multiplication would go into a graph as if what is stored were a constant.
    if torch.is_grad_enabled():
        return _OPS.scaled(grad, stored, leaf)
    product = stored * grad
    return product if product.dtype == leaf.dtype else product.to(leaf.dtype)


# teacher_kl takes lists of tensors that have no gradient, and weights, whose gradient is the KL
# that it returns anyway.
_WEIGHTS = 6
_TEACHER_KL_LEAVES = (0, 1, 2, _WEIGHTS)


def _keep_teacher_kl(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, w, scale, teacher_x, teacher_w, scales, weights, _, class_mask, *options = inputs
    temperature, _, _, _, t2 = options
    _, kl, used, _ = outputs
    ctx.k = len(teacher_x)
    tensors = (x, w, scale, *teacher_x, *teacher_w, scales, used, class_mask)
    of_weights = (None, None) if weights is None else (weights, kl)
    _save(ctx, (*of_weights, *tensors, temperature, t2))


def _teacher_kl_gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    weights, kl, x, w, scale, *rest = _saved(ctx)
    teacher_x, teacher_w, rest = rest[: ctx.k], rest[ctx.k : 2 * ctx.k], rest[2 * ctx.k :]
    wanted = [_needed(ctx, i) for i in range(3)]
    result = {}
    if any(wanted):
        operands = x, w, scale, teacher_x, teacher_w
        result = _where(wanted, _OPS.teacher_kl_backward(grad, *operands, *rest, wanted))
    if _needed(ctx, _WEIGHTS):
        result[_WEIGHTS] = _times(grad.unsqueeze(1), kl, weights)
    return result


def _keep_teacher_kl_reduced(
    ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> None:
    kl, weights, mean = outputs[1], inputs[_WEIGHTS], inputs[-2]
    ctx.rows = kl.shape[0] if mean else 1
    of_weights = (None, None) if weights is None else (weights, kl)
    _save(ctx, (*inputs[:3], *outputs[-3:], *of_weights))


def _teacher_kl_reduced_gradients(ctx: Any, grad: Tensor) -> dict[int, Tensor]:
    *saved, weights, kl = _saved(ctx)
    result = _scaled("teacher_kl_reduced", ctx, grad, saved[:3], saved[3:])
    if _needed(ctx, _WEIGHTS):
        result[_WEIGHTS] = _times(grad / ctx.rows, kl, weights)
    return result


def _no_gradient(op: str) -> None:
    what = "a loss of mulki" if op == "scaled" else f"mulki::{op.removesuffix('_backward')}"

    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"double backward of {what} is not supported; compute it with mulki.ops.reference"
        )

    torch.library.register_autograd(f"mulki::{op}", backward, lib=library)


_row_operator("similarity", leaves=3)
_row_operator("prototype_cross_entropy", leaves=3)
_row_operator("contrastive", leaves=3)
_row_operator("siglip", leaves=4)
_register("teacher_kl", _TEACHER_KL_LEAVES, _keep_teacher_kl, _teacher_kl_gradients)

_reduced_operator("prototype_cross_entropy_reduced", leaves=3)
_reduced_operator("contrastive_reduced", leaves=3)
_reduced_operator("siglip_reduced", leaves=4)
_register(
    "teacher_kl_reduced",
    _TEACHER_KL_LEAVES,
    _keep_teacher_kl_reduced,
    _teacher_kl_reduced_gradients,
)

for _op in (*(op for op in SCHEMAS if op.endswith("_backward")), "scaled"):
    _no_gradient(_op)
