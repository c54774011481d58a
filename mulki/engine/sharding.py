"""Models that do not fit on one device: their towers sharded over all processes (FSDP2).

Every tower is a unit of its own and so is each of its blocks, so that at most one block is whole at
a time. What lies outside the towers (the logit scale; in open_clip's plain CLIP the token
embedding and the text projection) stays whole in every process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mulki.models import VisionLanguageModel

# What open_clip, timm and transformers call a stack of blocks.
_STACKS = ("resblocks", "blocks", "layers", "layer", "stages")


def shard(model: VisionLanguageModel, device: torch.device) -> None:
    """Shard a model in place and move it to the device of each process.

    Args:
        model: the same weights in every process; a copy has to be made before, not after.
        device: of this process.
    """
    # FSDP takes weights of convolutions in the plain layout alone.
    model.clip.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for tower in model.towers():
        for module in [*_blocks(tower), tower]:
            # Also where FSDP would keep a tower whole after its forward pass: whoever asked for its
            # parameters then would hold the whole ones, whose memory is freed.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    model.clip.to(device)


def _blocks(tower: nn.Module) -> list[nn.Module]:
    stacks = [
        module
        for name, module in tower.named_modules()
        if name.rpartition(".")[2] in _STACKS and isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    blocks = [block for stack in stacks for block in stack]
    return [block for block in blocks if any(p.numel() for p in block.parameters())]
