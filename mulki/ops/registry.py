"""Defines an operator by one call: schema, fake kernel, kernels of every device, and gradients.

An operator is defined in two namespaces: `torch.ops.mulki`, which chooses a backend for a call
(`mulki.ops.backends`), and `torch.ops.mulki_cpp`, whose CPU kernels and gradients are in csrc/.

Nothing is mutated and no result shares memory with an argument. Arguments may have any strides. The
gradients beside a sum or a mean may become the `.grad` of a leaf without a copy
(`mulki.ops.autograd`): clone them to keep them after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor

from mulki.ops import autograd, backends, checks, namespaces
from mulki.ops.logits import waiting, wide
from mulki.ops.operators import OPERATORS, Operator, Shape

KEYS = ("CPU", "CUDA", "XPU", "MPS")
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    bool: "bool",
    int: "int",
    float: "float",
}


def define(
    name: str,
    arguments: type[Any],
    *,
    check: Callable[..., None],
    reference: Callable[[Any], tuple[Tensor, ...]],
    formula: Callable[[Any, str, bool], tuple[Tensor, ...]] | None = None,
    leaves: int = 3,
    rows: Callable[[Any], Shape] = lambda x: x[0].shape[:1],
    details: Callable[[Any], Sequence[Shape]] = lambda x: (),
    results: int = 0,
    averaged: Callable[[Any], Tensor | int] = lambda x: x[0].shape[0],
    dtype: Callable[[torch.dtype], torch.dtype] = wide,
    reductions: tuple[str, ...] = checks.REDUCTIONS,
    factor_of_weights: Callable[[Any], float] | None = None,
) -> None:
    """Define an operator.

    Args:
        arguments: a NamedTuple, of whose annotations the schema is made.
        check: called with the arguments before every kernel; raises where they do not fit. With
            ``values=False`` it reads no values, for the fake kernel.
        reference, leaves, rows, details, averaged, dtype, reductions: see `Operator`.
        formula: see `Operator`; None for the reference, reduced.
        results: how many details there are.
        factor_of_weights: of which multiple of the first detail the gradient of the field
            `weights` is, from the arguments; None where there are no weights.
    """
    hints = get_type_hints(arguments)
    fields = ", ".join(f"{_TYPES[hints[field]]} {field}" for field in arguments._fields)
    schema = (
        f"({fields}, Tensor? grad, str reduction, bool[{leaves}] wanted) -> "
        f"({', '.join(['Tensor'] * (1 + results + leaves))})"
    )

    def of_reference(x: Any, reduction: str, details: bool) -> tuple[Tensor, ...]:
        of_rows, *others = reference(x)
        return of_rows.mean() if reduction == "mean" else of_rows.sum(), *others

    functions = check, reference, formula or of_reference, rows, details, averaged, dtype
    tensors = [place for place, field in enumerate(arguments._fields) if hints[field] is Tensor]
    operator = Operator(name, schema, arguments, leaves, tensors, *functions, reductions)
    OPERATORS[name] = operator
    namespaces.PUBLIC.define(name + schema, tags=namespaces.TAGS)
    namespaces.CPP.define(name + schema, tags=namespaces.TAGS)
    for key in KEYS:
        namespaces.PUBLIC.impl(name, partial(backends.call, operator), key)
    torch.library.register_fake(f"mulki::{name}", partial(_fake, operator), lib=namespaces.PUBLIC)
    autograd.register(operator, factor_of_weights)


def _fake(operator: Operator, *args: Any) -> tuple[Tensor, ...]:
    x, request = operator.split(args)
    backends.check(operator, x, request, values=False)
    like = x[0]
    rows, details = operator.rows(x), operator.details(x)
    if request.reduction != "none":
        rows = rows[:-1]
    if request.grad is not None:
        rows, details = (0,), [(0,)] * len(details)
    gradients = (
        leaf.new_empty(
            leaf.shape if asked else (0,),
            dtype=waiting(leaf) if request.grad is None else leaf.dtype,
        )
        for leaf, asked in zip(x[: operator.leaves], request.wanted, strict=True)
    )
    return (
        like.new_empty(rows, dtype=operator.dtype(like.dtype)),
        *(like.new_empty(shape, dtype=wide(like.dtype)) for shape in details),
        *gradients,
    )
