"""The call of an operator for a loss in training, by the shortest way to who serves it.

That is `torch.ops.mulki.<op>`, whose gradients of a sum or a mean come with it. Small calls would
spend most of their time in the dispatcher and in Python. So where every tensor is a plain one and
nothing listens, such as a mode, a transform or a compiler, the dispatcher is left out. On the CPU
what is called is `torch.ops.mulki_cpp.<op>`, whose gradients are in csrc/autograd.cpp. The C++
kernels check their arguments; where one refuses, the checks of Python explain. Elsewhere, where one
block holds all logits, it is the formula (`mulki.ops.chunked.whole`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mulki.ops import backends, torch_private
from mulki.ops.arguments import refuse_transforms
from mulki.ops.logits import autocasting
from mulki.ops.operators import OPERATORS, Arguments


def call(op: str, x: Arguments, reduction: str, details: bool = True) -> tuple[Tensor, ...]:
    """`torch.ops.mulki.<op>`: the loss, the details, and the gradients that will be asked for.

    Args:
        details: whether they are wanted; where they are not, the loss may come alone.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError, ValueError: see `mulki.ops.backends.kernel`.
    """
    operator = OPERATORS[op]
    leaves = operator.leaves
    wanted = [False] * leaves
    if not torch_private.nothing_listens() or not _are_plain(x):
        refuse_transforms(x)
        if reduction != "none" and torch.is_grad_enabled():
            # What a tensor under vmap says of itself is not what the one behind it requires.
            every = torch_private.transform_is_active()
            wanted = [every or leaf.requires_grad for leaf in x[:leaves]]
        found: tuple[Tensor, ...] = getattr(torch.ops.mulki, op)(*x, None, reduction, wanted)
        return found
    with_gradients = reduction != "none" and torch.is_grad_enabled()
    if with_gradients:
        wanted = [leaf.requires_grad for leaf in x[:leaves]]
    features = x[0]
    logits = features.shape[0] * x[1].shape[0]
    kernel = backends.kernel(op, features.device.type, features.dtype, logits)
    if isinstance(kernel, backends.CppKernel) and not _asks_of_weights(x):
        try:
            return kernel.overload(*x, None, reduction, wanted)
        except (TypeError, ValueError, RuntimeError):
            operator.check(x)
            raise
    if with_gradients and isinstance(kernel, backends.PlainKernel):
        if autocasting(features.device.type):
            # Operands are rounded before; inside, autocast would round the logits.
            with torch.autocast(features.device.type, enabled=False):
                at_once = kernel.at_once(x, reduction, details)
        else:
            at_once = kernel.at_once(x, reduction, details)
        if at_once is not None:
            return at_once
    of_operator: tuple[Tensor, ...] = getattr(torch.ops.mulki, op)(*x, None, reduction, wanted)
    return of_operator


_PLAIN = frozenset({Tensor, nn.Parameter})


def _are_plain(x: Arguments) -> bool:
    # Whether the tensors, also those in lists, are plain ones that have values.
    for value in x:
        for t in value if type(value) is list else (value,):
            if isinstance(t, Tensor) and (type(t) not in _PLAIN or t.is_meta or t.is_neg()):
                return False
    return True


def _asks_of_weights(x: Arguments) -> bool:
    # Whether gradients are asked of more than the leaves, which csrc/autograd.cpp does not know.
    weights = getattr(x, "weights", None)
    return weights is not None and weights.requires_grad and torch.is_grad_enabled()
