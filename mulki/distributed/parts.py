"""Tensors of which each process has a part, as FSDP2 makes them, and whole ones."""

from __future__ import annotations

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
