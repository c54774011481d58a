"""Memory that shows what a kernel should not have touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BAND = 40  # elements before and behind
# A NaN of its own: who reads it spoils a result, who writes over it is found out.
BITS = {
    torch.float64: 0x7FF8BEAFBEAFBEAF,
    torch.float32: 0x7FC0BEAF,
    torch.bfloat16: 0x7FCB,
    torch.float16: 0x7EAF,
}
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def poisoned(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size,), BITS[dtype], dtype=INTEGERS[dtype]).view(dtype)


class Memory:
    """Uninitialised tensors full of NaN, between bands that nobody may write."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = poisoned(size + 2 * BAND, dtype)
        self.made.append(buffer)
        return buffer[BAND : BAND + size].view(shape)

    def check(self) -> None:
        for buffer in self.made:
            bits = buffer.view(INTEGERS[buffer.dtype])
            bands = torch.cat([bits[:BAND], bits[-BAND:]])
            assert (bands == BITS[buffer.dtype]).all(), "a kernel wrote beyond its tensor"


@contextmanager
def all_memory() -> Iterator[Memory]:
    """What kernels allocate comes from a `Memory`, which is checked at the end."""
    made = Memory()
    plain = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **other: Any) -> Any:
        if other:  # the interpreter's own
            return plain(self, *size, dtype=dtype, **other)
        return made.empty(_shape(size), dtype or self.dtype)

    def empty(*size: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        return made.empty(_shape(size), dtype)

    def empty_like(like: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        return made.empty(tuple(like.shape), dtype or like.dtype)

    with (
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
    ):
        yield made
    assert made.made, "no kernel allocated anything"
    made.check()


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
