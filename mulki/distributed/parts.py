"""Tensors of which each process has a part, as FSDP2 makes them, and whole ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a part; then all processes have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def set_whole(tensor: Tensor, value: Tensor) -> None:
    """Set a tensor, of which each process may have a part, to a whole one that all have."""
    if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
        # Without a source: nothing is sent, each process cuts its part.
        value = distribute_tensor(
            value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    tensor.copy_(value)
