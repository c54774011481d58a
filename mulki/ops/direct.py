"""The calls of the operators, by the shortest way to the C++ kernels.

`call` is `torch.ops.mulki.<op>` for a loss in training: the gradients of a sum or a mean come with
it. Small calls would spend most of their time in Python. So where every tensor is a plain one on
the CPU and nothing listens, such as a mode, a transform or a compiler, it takes
`torch.ops.mulki_cpp.<op>`, whose gradients are in csrc/autograd.cpp. The kernels check their
arguments only as far as they must; where one refuses, the checks of Python explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mulki.ops import backends, torch_private
from mulki.ops.operators import OPERATORS, Arguments

# Types of arguments that are neither tensors nor lists.
_NUMBERS = frozenset({bool, float, int, type(None)})


def call(op: str, x: Arguments, reduction: str) -> tuple[Tensor, ...]:
    """`torch.ops.mulki.<op>`: the loss, the details, and the gradients that will be asked for.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError, ValueError: see `mulki.ops.backends.kernel`.
    """
    leaves = OPERATORS[op].leaves
    wanted = [False] * leaves
    if reduction != "none" and torch.is_grad_enabled():
        wanted = [leaf.requires_grad for leaf in x[:leaves]]
    if _may_be_direct(x, leaves):
        kernel = backends.kernel(op, "cpu", x[0].dtype)
        if isinstance(kernel, backends.CppKernel):
            try:
                return kernel.overload(*x, None, reduction, wanted)
            except (TypeError, ValueError, RuntimeError):
                OPERATORS[op].check(x)
                raise
    found: tuple[Tensor, ...] = getattr(torch.ops.mulki, op)(*x, None, reduction, wanted)
    return found


def _may_be_direct(x: Arguments, leaves: int) -> bool:
    if torch.compiler.is_compiling() or torch_private.is_watched():
        return False
    leaves = leaves if torch.is_grad_enabled() else len(x)
    return _are_plain(x[:leaves], True) and _are_plain(x[leaves:], False)


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
