"""The calls of the operators, by the shortest way to their kernels.

`call` is `torch.ops.mulki.<op>` for a loss in training: the gradients of a sum or a mean come with
it. Small calls would spend most of their time in Python. So where every tensor is a plain one and
nothing listens, such as a mode, a transform or a compiler, the dispatcher is left out. On the CPU
that is `torch.ops.mulki_cpp.<op>`, whose gradients are in csrc/autograd.cpp. The C++ kernels check
their arguments only as far as they must; where one refuses, the checks of Python explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mulki.ops import backends, torch_private
from mulki.ops.autograd import FUNCTIONS
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
        # What a tensor under vmap says of itself is not what the one behind it requires.
        every = torch_private.transform_is_active()
        wanted = [every or leaf.requires_grad for leaf in x[:leaves]]
    request = None, reduction, wanted
    if not _may_be_direct(x, leaves):
        found: tuple[Tensor, ...] = getattr(torch.ops.mulki, op)(*x, *request)
        return found
    if x[0].is_cpu:
        kernel = backends.kernel(op, "cpu", x[0].dtype)
        if isinstance(kernel, backends.CppKernel):
            try:
                return kernel.overload(*x, *request)
            except (TypeError, ValueError, RuntimeError):
                OPERATORS[op].check(x)
                raise
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in x[:leaves]):
        of_function: tuple[Tensor, ...] = FUNCTIONS[op].apply(*x, *request)
        return of_function
    return backends.call(OPERATORS[op], *x, *request)


def _may_be_direct(x: Arguments, leaves: int) -> bool:
    if torch.compiler.is_compiling() or torch_private.is_watched():
        return False
    leaves = leaves if torch.is_grad_enabled() else len(x)
    return _are_plain(x[:leaves], True) and _are_plain(x[leaves:], False)


def _are_plain(values: Sequence[Any], may_require_grad: bool) -> bool:
    # Whether the tensors among them are plain ones that have values.
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is nn.Parameter:
            if value.is_meta or value.is_neg() or (value.requires_grad and not may_require_grad):
                return False
        elif kind in _NUMBERS:
            continue
        elif kind is list:
            if not _are_plain(value, may_require_grad):
                return False
        elif isinstance(value, Tensor):
            return False
    return True
