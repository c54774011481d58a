"""What the functions of the operators do to their arguments: rounding, numbers, which gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    if not autocasting(features.device.type) or features.dtype == torch.float64:
        if features.dtype != prototypes.dtype:
            checks.matrices(features, prototypes, names)
        return operands
    dtype = torch.get_autocast_dtype(features.device.type)
    return features.to(dtype), prototypes.to(dtype), scale


# Numbers that were passed lately, as tensors; nothing writes to an argument of an operator.
_numbers: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
_MOST_NUMBERS = 64


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A 0-d tensor of the wide dtype where `like` is; filling one does not wait for a GPU."""
    dtype = wide(like.dtype)
    if isinstance(value, Tensor):
        if value.dtype == dtype and value.device == like.device:
            return value
        elsewhere = type(value) is Tensor and value.is_cpu and not like.is_cpu
        if elsewhere and not value.requires_grad and torch_private.nothing_listens():
            return torch.full((), value.item(), dtype=dtype, device=like.device)
        return value.to(like.device, dtype)
    if torch.compiler.is_compiling():
        # torch.compile would take a number that fills a tensor for a constant.
        return torch.ones((), dtype=dtype, device=like.device) * float(value)
    key = value, dtype, like.device
    found = _numbers.get(key) if like.is_cpu else None
    if found is None:
        # An inference tensor could not be saved for a backward pass.
        with torch.inference_mode(False):
            found = torch.full((), float(value), dtype=dtype, device=like.device)
        # A stream of a GPU, or a mode, may hold what it makes for its own.
        if like.is_cpu and torch_private.nothing_listens():
            if len(_numbers) >= _MOST_NUMBERS:
                _numbers.clear()
            _numbers[key] = found
    return found


def savable(value: Any) -> Any:
    """A tensor that autograd can save: a copy of an inference tensor, as frozen prototypes may be.

    Other values are handed back as they are.
    """
    if isinstance(value, Tensor) and value.is_inference() and torch.is_grad_enabled():
        return value.clone()
    return value


def with_bias(loss: Tensor, logit_bias: Tensor | float | None) -> Tensor:
    """`loss`, whose softmax does not see the bias, with a gradient of zero for it.

    A parameter without a gradient would keep DDP waiting.
    """
    if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
        return loss + 0 * logit_bias.to(loss)
    return loss


_FORWARD_MODE = "forward-mode differentiation of mulki is not supported; use reverse mode"


def refuse_transforms(values: Sequence[Any]) -> None:
    """Raise a RuntimeError where one of the tensors, also in lists, is differentiated otherwise.

    In forward mode autograd would drop the tangent in silence, and the derivative would be zero.
    The gradients of `torch.func` fail in torch, whose message does not say what to do. In compiled
    code forward mode is refused whatever the tensors are.
    """
    if torch_private.nothing_listens():
        return
    compiling = torch.compiler.is_compiling()
    forward_mode = torch_private.forward_mode_may_be_on()
    if compiling and forward_mode and torch_private.reason() is None:
        raise RuntimeError(_FORWARD_MODE)
    for value in values:
        if isinstance(value, list):
            refuse_transforms(value)
        if not isinstance(value, Tensor):
            continue
        if forward_mode and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(_FORWARD_MODE)
        if not compiling and torch_private.is_differentiated_by_transform(value):
            raise RuntimeError(
                "torch.func.grad, vjp and jacrev of mulki are not supported; use "
                "torch.autograd.grad or backward()"
            )
