"""Kernels in Triton's interpreter, on memory that shows what they should not have touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mulki.ops import use_backend

if os.environ.get("TRITON_INTERPRET") != "1":
    # test_interpreted.py runs this folder.
    collect_ignore_glob = ["test_*.py"]

BAND = 40  # elements before and behind
# A NaN of its own: who reads it spoils a result, who writes over it is found out.
BITS = {torch.float32: (0x7FC0BEAF, torch.int32), torch.bfloat16: (0x7FCB, torch.int16)}
BITS[torch.float16] = 0x7EAF, torch.int16


def poisoned(size: int, dtype: torch.dtype) -> Tensor:
    """Numbers that nobody may use."""
    bits, integers = BITS[dtype]
    return torch.full((size,), bits, dtype=integers).view(dtype)


@contextmanager
def all_memory() -> Iterator[None]:
    """What kernels allocate is full of NaN, between bands that nobody may write."""
    made: list[Tensor] = []
    plain = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **other: Any) -> Any:
        if other or (dtype or self.dtype) not in BITS:  # the interpreter's own
            return plain(self, *size, dtype=dtype, **other)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = torch.Size(shape).numel()
        made.append(poisoned(count + 2 * BAND, dtype or self.dtype))
        return made[-1][BAND : BAND + count].view(shape)

    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        yield
    assert made, "no kernel allocated anything"
    for buffer in made:
        bits, integers = BITS[buffer.dtype]
        bands = torch.cat([buffer[:BAND], buffer[-BAND:]]).view(integers)
        assert (bands == torch.tensor(bits, dtype=integers)).all(), "written beyond a tensor"


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton serves, and nobody in its place."""
    monkeypatch.setenv("MULKI_STRICT", "1")
    with use_backend("triton"), all_memory():
        yield
