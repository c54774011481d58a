"""How much is kept for the backward pass, at its peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor


class SavedBytes:
    """Peak bytes that graphs keep while `watching`, each storage once.

    Args:
        apart: tensors that are there anyway, such as weights and the batch; not counted.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        self._apart = {t.untyped_storage().data_ptr() for t in apart}
        self._users: Counter[int] = Counter()
        self.held = 0
        self.peak = 0

    def watching(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which the graphs are made."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        kept = _Kept(tensor)
        if storage.data_ptr() not in self._apart:
            self._count(storage.data_ptr(), storage.nbytes(), +1)
            weakref.finalize(kept, self._count, storage.data_ptr(), storage.nbytes(), -1)
        return kept

    def _count(self, address: int, size: int, change: int) -> None:
        before = self._users[address]
        self._users[address] += change
        self.held += size * ((before + change > 0) - (before > 0))
        self.peak = max(self.peak, self.held)


class _Kept:
    """A saved tensor; it goes when its graph does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
