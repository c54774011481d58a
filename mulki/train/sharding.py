"""Models that do not fit on one device: their towers sharded over all processes (FSDP2).

Every block of a tower is a unit of FSDP, and so is the rest of the tower, so that at most one block
is whole at a time. Under autocast the copies of weights that a backward pass needs are whole until
then; with `--grad-checkpointing` there are none. Parameters outside the towers (the logit scale; in
open_clip's plain CLIP the token embedding and the text projection) stay whole in every process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mulki.clip.models import VisionLanguageModel

# Names of a stack of blocks in open_clip, timm and transformers.
_STACKS = ("resblocks", "blocks", "layers", "layer", "stages")


def shard(model: VisionLanguageModel, device: torch.device) -> None:
    """Shard a model in place and move it to the device of each process.

    Args:
        model: the same weights in every process. A sharded model cannot be copied, so copy it
            before.
        device: of this process.
    """
    # FSDP accepts convolution weights in the contiguous layout only.
    model.clip.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for tower in model.towers():
        for module in [*_blocks(tower), tower]:
            # FSDP's default keeps the root unsharded after its forward pass. Code that reads its
            # parameters then would get the whole ones, whose memory FSDP frees later.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    model.clip.to(device)


def _blocks(tower: nn.Module) -> list[nn.Module]:
    stacks = [
        module
        for name, module in tower.named_modules()
        if name.rpartition(".")[2] in _STACKS and isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    blocks = [block for stack in stacks for block in stack]
    # Inner ones first, as FSDP wants them: a stage of ConvNeXt has blocks of its own.
    return [block for block in reversed(blocks) if any(p.numel() for p in block.parameters())]
