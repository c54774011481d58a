"""Kernels in Triton's interpreter, on memory that shows what they should not have touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted.triton_memory import Memory

if os.environ.get("TRITON_INTERPRET") != "1":
    # test_interpreted.py runs this folder.
    collect_ignore_glob = ["test_*.py"]


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """What kernels allocate comes from here."""
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

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    yield made
    monkeypatch.undo()
    assert made.made, "no kernel allocated anything"
    made.check()
