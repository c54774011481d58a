"""Defines operators: schema, fake kernel, and the kernels of every device, by one call each.

An operator is defined in two namespaces: `torch.ops.mulki`, which chooses a backend for a call
(`mulki.ops.backends`), and `torch.ops.mulki_cpp`, whose CPU kernels are in csrc/.

It comes in up to three forms:

    name            one loss per row, and by-products, which are not differentiable
    name_backward   from an upstream gradient per row to those of features and prototypes (in their
                    dtype), scale and bias (0-d, wide)
    name_reduced    the sum, or the mean, and its gradients, all of them wide: a loss scaler must
                    act before a gradient is rounded to half precision

"Wide" is float64 for float64 inputs and float32 otherwise. `wanted` says which gradients are
computed; one that is not wanted comes back empty, of shape [0]. Nothing is mutated and no result
shares memory with an argument. Arguments may have any strides. The gradients that a `name_reduced`
returns may become the `.grad` of a leaf without a copy (`mulki.ops.autograd`): clone them to keep
them after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from mulki.ops import backends
from mulki.ops.logits import wide
from mulki.ops.operators import OPERATORS, Operator

Fake = Callable[..., Any]

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
KEYS = ("CPU", "CUDA", "XPU", "MPS")

library = Library("mulki", "DEF")
_cpp = Library("mulki_cpp", "DEF")


def define(
    name: str, schema: str, *, check: Callable[..., None], fake: Fake, reference: Callable[..., Any]
) -> None:
    """Define one form of an operator.

    Args:
        schema: arguments and results, as `torch.library.Library.define` takes them.
        check: called with the arguments before every kernel; raises where they do not fit. With
            ``values=False`` it reads no values, for the fake kernel.
        fake: from the arguments, checked, to empty results: shapes and dtypes for tracing.
        reference: the operator in plain PyTorch, on any device.
    """
    OPERATORS[name] = Operator(schema, check, reference)
    library.define(name + schema, tags=TAGS)
    _cpp.define(name + schema, tags=TAGS)
    for key in KEYS:
        library.impl(name, partial(backends.call, name), key)

    def checked_fake(*args: Any) -> Any:
        check(*args, values=False)
        return fake(*args)

    torch.library.register_fake(f"mulki::{name}", checked_fake, lib=library)


def backward_fake(leaves: int) -> Fake:
    """The fake kernel of a `_backward` form whose first arguments after `grad` are the leaves."""

    def fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(_empty_gradients(args[:leaves], args[-1], in_dtype_of_leaves=True))

    return fake


def reduced_fake(rows: Fake, leaves: int, details: int = 0) -> Fake:
    """The fake kernel of a `_reduced` form, from that of the row form.

    Args:
        details: by-products of the row form that the reduced form returns too.
    """

    def fake(*args: Any) -> tuple[Tensor, ...]:
        output = rows(*args[:-2])
        loss, *rest = output if isinstance(output, tuple) else (output,)
        gradients = _empty_gradients(args[:leaves], args[-1], in_dtype_of_leaves=False)
        return loss.new_empty(()), *rest[:details], *gradients

    return fake


def _empty_gradients(
    leaves: Sequence[Tensor], wanted: Sequence[bool], in_dtype_of_leaves: bool
) -> list[Tensor]:
    # Leaves are features, prototypes and numbers; the gradients of numbers are always wide.
    like = leaves[0]
    return [
        like.new_empty(
            leaf.shape if asked else (0,),
            dtype=like.dtype if in_dtype_of_leaves and leaf.ndim else wide(like.dtype),
        )
        for leaf, asked in zip(leaves, wanted, strict=True)
    ]
