"""How many samples can be encoded at a time in the memory that is free, and how it is kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# Part of the free memory that a micro-batch may fill with tensors saved for the backward pass; the
# rest is for temporary tensors of the encoder.
_USED_FRACTION = 0.5


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch that fits.

    Args:
        size: samples.
        per_sample: bytes that are saved of a sample for the backward pass.
        available: bytes that are free for them; None if that is not known.
        largest: samples that would fit if there were as many; None if that is not known.
    """

    size: int
    per_sample: int
    available: int | None
    largest: int | None = None

    def __str__(self) -> str:
        mib = 2**20
        free = "unknown memory" if self.available is None else f"{self.available / mib:.0f} MiB"
        return f"{self.per_sample / mib:.1f} MiB an image, {free} free"


def fitting_micro_batch(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    parameters: Sequence[nn.Parameter],
    available: int | None,
    *,
    beside: int = 0,
    tried: bool = False,
    smallest: Callable[[int], int] = lambda number: number,
) -> MicroBatch:
    """The largest micro-batch of `images` whose graph takes at most half of the free memory.

    The memory of a sample is measured with a forward pass of one sample and of two. The state of
    torch's generators and the gradients are the same afterwards.

    Args:
        encode: from images to features, with gradients to its parameters.
        images: a batch.
        parameters: what trains. Memory is left for the gradient and the two AdamW moments of each,
            which are allocated later.
        available: free bytes; None if that is not known.
        beside: bytes that the step saves for the backward pass beside the graph of the images.
        tried: run forward and backward with the size found, and halve it until that succeeds: for
            devices that raise an error when their memory is exhausted.
        smallest: from a number to the smallest of all processes. All of them then try the same
            sizes; `encode` must not communicate with other processes.
    """
    devices = {p.device for p in parameters if p.device.type not in ("cpu", "meta")}
    with _generators_kept(devices):
        per_sample = max(_bytes_of_a_sample(encode, images), 1)
        if available is not None:
            available = max(available - 3 * sum(local(p).nbytes for p in parameters), 0)
            room = int(_USED_FRACTION * available) - beside
            largest = max(room // per_sample, 1)
            size = min(largest, len(images))
        else:
            largest, size = None, len(images)
        size = smallest(size)
        while tried and size > 1 and not smallest(_passes(encode, images[:size], parameters)):
            size //= 2
            largest = size
    return MicroBatch(size, per_sample, available, largest)


def graph_bytes(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> int:
    """Bytes that encoding these inputs [n, ...] saves for the backward pass.

    Measured with a forward pass of one sample and of two; torch's generators stay as they are.
    """
    with _generators_kept({inputs.device} - {torch.device("cpu")}):
        return len(inputs) * _bytes_of_a_sample(encode, inputs)


def _bytes_of_a_sample(encode: Callable[[Tensor], Tensor], inputs: Tensor) -> int:
    one = _saved_bytes(encode, inputs[:1])
    two = _saved_bytes(encode, inputs[:2]) if len(inputs) > 1 else one
    return max(two - one, 0)


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that is on this process: all of it where it is not sharded."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@contextlib.contextmanager
def _generators_kept(devices: Collection[torch.device]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            if device.type != "mps":
                kept = torch.random.fork_rng(devices=[device], device_type=device.type)
                stack.enter_context(kept)
        yield


def _saved_bytes(encode: Callable[[Tensor], Tensor], images: Tensor) -> int:
    # Each storage is counted once: many saved tensors are views of the same one. All are held until
    # they are counted, since the allocator reuses a freed address.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encode(images)
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held)}
    del features
    return sum(storages.values())


def _passes(
    encode: Callable[[Tensor], Tensor], images: Tensor, parameters: Sequence[nn.Parameter]
) -> bool:
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None  # which would be added to in place
    try:
        if (total := encode(images).sum()).requires_grad:
            total.backward()
    except torch.OutOfMemoryError:
        torch.accelerator.empty_cache()
        return False
    finally:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
    return True


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device, None if that is not known."""
    if device.type != "cpu":
        try:
            free, _ = torch.accelerator.get_memory_info(device)
            kept = torch.accelerator.memory_reserved(device)
            return free + kept - torch.accelerator.memory_allocated(device)
        except (RuntimeError, ValueError, NotImplementedError):
            return None
    limits = [limit for limit in (_available(), _cgroup_left()) if limit is not None]
    return min(limits, default=None)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that were in use so far, None if that is not known.

    On the CPU by this process with all that it has loaded, on another device by its tensors.
    """
    if device.type != "cpu":
        here = torch.accelerator.current_accelerator()
        if here is None or here.type != device.type:
            return None
        try:
            return torch.accelerator.max_memory_allocated(device)
        except (RuntimeError, ValueError, NotImplementedError):
            return None
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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
    # The limit of a container, which /proc/meminfo does not show.
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
        return None if limit == "max" else max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return None


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed CPU tensors for the next ones, in the whole process.

    By default it gives blocks of some MiB back to the system, which hands them out again page by
    page and filled with zeros: 29 % of the time of a run of the bundled model on a CPU. The
    largest memory in use grew by 6 % there.

    Returns:
        Whether the C library can do it; it can where it is glibc.
    """
    if os.name != "posix" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    largest = 2**31 - 1
    return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, largest))
