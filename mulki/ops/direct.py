"""The shortest way to the C++ kernels: small calls would spend most of their time in Python.

`call` is `torch.ops.mulki.<op>`. Where every tensor is a plain one on the CPU and nothing listens,
such as a mode, a transform or a compiler, it takes `torch.ops.mulki_cpp.<op>`, whose gradients are
in csrc/autograd.cpp. The kernels check their arguments only as far as they must; where one refuses,
the checks of Python explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mulki.ops import backends, torch_private
from mulki.ops.operators import DIFFERENTIABLE, OPERATORS

# Types of arguments that are neither tensors nor lists.
_NUMBERS = frozenset({bool, float, int, type(None)})


def call(op: str, *args: Any) -> Any:
    """`torch.ops.mulki.<op>` of these arguments.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError, ValueError: see `mulki.ops.backends.kernel`.
    """
    if not _may_be_direct(op, args) or (kernel := _cpp_kernel(op, args[0].dtype)) is None:
        return getattr(torch.ops.mulki, op)(*args)
    try:
        return kernel(*args)
    except (TypeError, ValueError, RuntimeError):
        OPERATORS[op].check(*args)
        raise


def _cpp_kernel(op: str, dtype: torch.dtype) -> backends.Kernel | None:
    kernel = backends.kernel(op, "cpu", dtype)
    return kernel if kernel is getattr(torch.ops.mulki_cpp, op).default else None


def _may_be_direct(op: str, args: Sequence[Any]) -> bool:
    if torch.compiler.is_compiling() or torch_private.is_watched():
        return False
    leaves = DIFFERENTIABLE.get(op, 0) if torch.is_grad_enabled() else len(args)
    return _are_plain(args[:leaves], True) and _are_plain(args[leaves:], False)


def _are_plain(values: Sequence[Any], may_require_grad: bool) -> bool:
    # Whether the tensors among them are plain ones on the CPU.
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            if not value.is_cpu or (value.requires_grad and not may_require_grad):
                return False
        elif kind in _NUMBERS:
            continue
        elif kind is list:
            if not _are_plain(value, may_require_grad):
                return False
        elif isinstance(value, Tensor):
            return False
    return True
