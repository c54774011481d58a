"""The functions of a block, compiled by torch's inductor where the user asks for it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def into(memory: Tensor) -> Tensor | None:
    """`memory`, for the result of an operation; None for the compiler, which needs less of it."""
    return None if torch.compiler.is_compiling() else memory


def filled(u: Tensor, where: Tensor, value: float) -> Tensor:
    """`u` with that value there, in place but for the compiler."""
    compiling = torch.compiler.is_compiling()
    return u.masked_fill(where, value) if compiling else u.masked_fill_(where, value)


def asked() -> bool:
    """Whether MULKI_COMPILE asks for it: any value but the empty one and 0."""
    return os.environ.get("MULKI_COMPILE", "") not in ("", "0")


def compilable(function: _Function) -> _Function:
    """The function, compiled under MULKI_COMPILE, for all sizes.

    Each form, as with a class mask or without gradients, is compiled once. Beyond torch's limit of
    forms further ones run as they are.
    """

    @functools.cache
    def compiled() -> Any:
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return (compiled() if asked() else function)(*args, **options)

    return call  # type: ignore[return-value]
