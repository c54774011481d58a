"""What is known of every operator: its schema, the check of its arguments, and its reference.

`mulki.ops.registry` fills the table; `backends` and `loader` read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Operator(NamedTuple):
    """One form of an operator."""

    schema: str  # arguments and results; the C++ kernels are built for it
    check: Callable[..., None]  # of the arguments; raises where they do not fit
    reference: Callable[..., Any]  # the operator in plain PyTorch, on any device


OPERATORS: dict[str, Operator] = {}

# The operators that csrc/autograd.cpp gives gradients, and to how many of their first arguments.
DIFFERENTIABLE = {
    "similarity": 3,
    "prototype_cross_entropy_reduced": 3,
    "teacher_kl_reduced": 3,
    "contrastive_reduced": 3,
    "siglip_reduced": 4,
    "pair_kl_reduced": 3,
}
