"""What the functions of the operators do to their arguments: rounding, numbers, which gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mulki.ops import checks, torch_private
from mulki.ops.logits import Operands, autocasting, wide


def rounded(operands: Operands, names: Sequence[str] = ("features", "prototypes")) -> Operands:
    """Features and prototypes in the autocast dtype under autocast, else as they are.

    float64 is left alone.

    Raises:
        TypeError: the dtypes differ outside autocast.
    """
    features, prototypes, scale = operands
    kind = features.device.type
    if not autocasting(kind) or features.dtype == torch.float64:
        if features.dtype != prototypes.dtype:
            checks.matrices(features, prototypes, names)
        return operands
    dtype = torch.get_autocast_dtype(kind)
    return features.to(dtype), prototypes.to(dtype), scale


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A 0-d tensor of the wide dtype where `like` is; filling one does not wait for a GPU."""
    dtype = wide(like.dtype)
    if not isinstance(value, Tensor):
        if torch.compiler.is_compiling():
            # torch.compile would take a number that fills a tensor for a constant.
            return torch.ones((), dtype=dtype, device=like.device) * float(value)
        return torch.full((), float(value), dtype=dtype, device=like.device)
    if value.dtype == dtype and value.device == like.device:
        return value
    elsewhere = type(value) is Tensor and value.is_cpu and not like.is_cpu
    traced = torch.compiler.is_compiling() or torch_private.transform_is_active()
    if elsewhere and not (traced or value.requires_grad):
        return torch.full((), value.item(), dtype=dtype, device=like.device)
    return value.to(like.device, dtype)


def scalars(values: Sequence[Tensor | float], like: Tensor) -> Tensor:
    """The same of K values, [K]."""
    # To compare numbers would make torch.compile take each new one for a constant.
    if not torch.compiler.is_compiling() and not any(isinstance(v, Tensor) for v in values):
        first, *others = map(float, values)
        if all(other == first for other in others):
            return torch.full((len(values),), first, dtype=wide(like.dtype), device=like.device)
    return torch.stack([scalar(value, like) for value in values])


def with_bias(loss: Tensor, logit_bias: Tensor | float | None) -> Tensor:
    """`loss`, whose softmax does not see the bias, with a gradient of zero for it.

    A parameter without a gradient would keep DDP waiting.
    """
    if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
        return loss + 0 * logit_bias.to(loss)
    return loss


_FORWARD_MODE = "forward-mode differentiation of mulki is not supported; use reverse mode"


def refuse_transforms(*groups: Sequence[Tensor | float | None]) -> None:
    """Raise a RuntimeError where a leaf in one of the groups is differentiated otherwise.

    In forward mode autograd would drop the tangent in silence, and the derivative would be zero.
    The gradients of `torch.func` fail in torch, whose message does not say what to do. In compiled
    code forward mode is refused whatever the leaves are.
    """
    forward_mode = not torch_private.forward_mode_is_off()
    if torch.compiler.is_compiling():
        if forward_mode and torch_private.reason() is None:
            raise RuntimeError(_FORWARD_MODE)
        return
    if not (forward_mode or torch_private.transform_is_active()):
        return
    for leaf in itertools.chain(*groups):
        if not isinstance(leaf, Tensor):
            continue
        if forward_mode and forward_ad.unpack_dual(leaf).tangent is not None:
            raise RuntimeError(_FORWARD_MODE)
        if torch_private.is_differentiated_by_transform(leaf):
            raise RuntimeError(
                "torch.func.grad, vjp and jacrev of mulki are not supported; use "
                "torch.autograd.grad or backward()"
            )
