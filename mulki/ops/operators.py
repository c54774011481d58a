"""What is known of every operator: its arguments, their check, and its reference.

An operator takes the fields of its arguments, and what is asked of it (`Request`). It returns a
loss, by-products that are not differentiable ("details"), and the gradients of its leaves, which
are its first arguments. `mulki.ops.registry` fills the table; `backends` and `loader` read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The values of the arguments of an operator: a NamedTuple of its own.
Arguments = Any
Shape = tuple[int, ...]


class Request(NamedTuple):
    """What is asked of an operator: its last arguments, the same for all."""

    # The upstream gradient, of the shape of the loss. With it there are gradients alone, in the
    # dtypes of the leaves; loss and details come back empty, [0]. Without it they are those of the
    # sum of the loss, in a dtype in which they wait for it (`mulki.ops.logits.waiting`).
    grad: Tensor | None
    reduction: str  # over the rows: "none", "sum" or "mean"
    wanted: Sequence[bool]  # of which leaves there are gradients; others come back empty, [0]


class Operator(NamedTuple):
    """One operator."""

    name: str
    schema: str  # arguments and results; the C++ kernels are built for it
    arguments: type[Any]  # the NamedTuple
    leaves: int  # how many of its first fields have gradients
    tensors: Sequence[int]  # the places of fields that have to be tensors
    check: Callable[..., None]  # of the arguments; raises where they do not fit
    # From the arguments to the loss of each row and the details: plain PyTorch on any device,
    # differentiable in the loss.
    reference: Callable[[Arguments], tuple[Tensor, ...]]
    # From the arguments, "sum" or "mean", and whether details are wanted, to the loss and the
    # details, for few logits: by the fewest operations, and differentiable by all that the operator
    # is. There is at least one row.
    formula: Callable[[Arguments, str, bool], tuple[Tensor, ...]]
    rows: Callable[[Arguments], Shape]  # shape of the loss without a reduction
    details: Callable[[Arguments], Sequence[Shape]]  # shapes, all wide
    averaged: Callable[[Arguments], Tensor | int]  # the rows of a mean
    dtype: Callable[[torch.dtype], torch.dtype]  # from that of the features to that of the loss
    reductions: tuple[str, ...]

    def split(self, args: Sequence[Any]) -> tuple[Arguments, Request]:
        """The arguments of a call, and what it asks for."""
        return self.arguments._make(args[:-3]), Request._make(args[-3:])


OPERATORS: dict[str, Operator] = {}
