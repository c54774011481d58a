"""Tensors of which each process has a part, as FSDP2 makes them, and whole ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def set_whole(tensor: Tensor, whole: Tensor) -> None:
    """Set a tensor, of which each process may have a part, to a whole one that all have."""
    if isinstance(tensor, DTensor) and not isinstance(whole, DTensor):
        # Without a source: nothing is sent, each process cuts its part.
        whole = distribute_tensor(
            whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    tensor.copy_(whole)


def gathered(state: Any, kept: bool) -> Any:
    """Nested dicts and lists with whole tensors, on the CPU, in place of sharded ones.

    All processes have to call this, with the same structure. One tensor at a time is whole on the
    device.

    Args:
        kept: whether this process needs the whole tensors; else None is in their place.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor().detach()
        return whole.cpu() if kept else None
    if isinstance(state, dict):
        return {name: gathered(each, kept) for name, each in state.items()}
    if isinstance(state, (list, tuple)):
        return [gathered(each, kept) for each in state]
    return state
