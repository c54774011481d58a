"""How many samples can be encoded at a time in the memory that is free."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# The rest is for what an encoder needs beyond what it saves for its backward pass.
_SHARE = 0.5


@dataclass(frozen=True)
class Fit:
    """A micro-batch that fits.

    Args:
        size: samples.
        per_sample: bytes that a sample keeps for the backward pass.
        available: free bytes.
    """

    size: int
    per_sample: int
    available: int

    def __str__(self) -> str:
        mib = 2**20
        return f"{self.per_sample / mib:.1f} MiB an image, {self.available / mib:.0f} MiB free"


def fitting_micro_batch(
    encode: Callable[[Tensor], Tensor], images: Tensor, available: int | None = None
) -> Fit:
    """The largest micro-batch of `images` whose graph takes half of the free memory.

    What a sample keeps is measured on a forward pass of one and of two of them. Where a device
    reports when its memory is exhausted, the size found is tried, and halved until it passes.

    Args:
        encode: from images to features, with gradients to its parameters.
        images: a batch.
        available: free bytes; by default those of the images' device.
    """
    available = free_memory(images.device) if available is None else available
    one = _saved_bytes(encode, images[:1])
    two = _saved_bytes(encode, images[:2]) if len(images) > 1 else one
    per_sample = max(two - one, 1)
    size = min(max(int(_SHARE * available) // per_sample, 1), len(images))
    while size > 1 and not _passes(encode, images[:size]):
        size //= 2
    return Fit(size, per_sample, available)


def _saved_bytes(encode: Callable[[Tensor], Tensor], images: Tensor) -> int:
    # Each storage once: many saved tensors are views of one. They are held until all are counted,
    # since an address that is free is used again.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encode(images)
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held)}
    del features
    return sum(storages.values())


def _passes(encode: Callable[[Tensor], Tensor], images: Tensor) -> bool:
    try:
        encode(images).sum()
    except torch.OutOfMemoryError:
        torch.get_device_module(images.device).empty_cache()
        return False
    return True


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device, 0 if that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return 0
    limits = [_available(), _cgroup_left()]
    return min((limit for limit in limits if limit is not None), default=0)


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return None


def _cgroup_left() -> int | None:
    # A container's limit, which /proc/meminfo does not show.
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
        return None if limit == "max" else max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return None
