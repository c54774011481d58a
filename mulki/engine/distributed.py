"""One run on many processes, with the results of one process that has the same global batch.

Encoding is shared out: every process encodes its part of the batch, of the class texts and of what
the teachers are asked, and the features are exchanged. The losses are then computed on the whole
batch by every process, from the same numbers, so that a method needs to know nothing of this, and
its state (prototypes, running means) stays the same everywhere. A gradient that reaches features is
cut to the process's own rows and multiplied by the number of processes; gradients of parameters are
averaged. So what the losses send to a parameter directly counts once, and what goes through an
encoder adds up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mulki.collectives import gather_rows
from mulki.errors import InputError, ProcessLost

# Elements in one reduction of gradients: large enough for the network, small beside a model.
_BUCKET = 2**25


class World:
    """The processes of a run.

    Args:
        rank: of this process, from 0.
        size: how many there are. Processes of more than one must be in the default process group.
        joined: whether the process group was made for this run and ends with it.
    """

    def __init__(self, rank: int = 0, size: int = 1, joined: bool = False):
        self.rank = rank
        self.size = size
        self._joined = joined

    def leave(self) -> None:
        """Leave the process group, if `join` made it."""
        if self._joined:
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    def rows(self, count: int) -> list[int]:
        """Which of `count` rows are this process's: equally many in each, in order.

        Where they do not divide, the last row is repeated; `gather` leaves the repetitions out.
        """
        share = -(-count // self.size)
        return [min(self.rank * share + i, count - 1) for i in range(share)]

    def own(self, count: int) -> int:
        """How many of `rows` are not repetitions."""
        share = -(-count // self.size)
        return max(0, min(share, count - self.rank * share))

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor that all of them have."""
        return whole if self.size == 1 else whole[self.rows(len(whole))]

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """The `count` rows of all processes, in order, from each one's share of them.

        Differentiable under the convention above: every process has to compute the same loss, and
        gradients of parameters have to be averaged.
        """
        if self.size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self, count)
        return gathered

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of parameters over all processes, in few reductions.

        Sharded parameters are left out: FSDP has averaged theirs.
        """
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            for bucket in _buckets(gradients):
                flat = torch.cat([g.flatten() for g in bucket])
                with _together():
                    dist.all_reduce(flat)
                flat /= self.size
                for gradient, part in zip(
                    bucket, flat.split([g.numel() for g in bucket]), strict=True
                ):
                    gradient.copy_(part.view_as(gradient))

    def total(self, *numbers: int, device: torch.device) -> list[int]:
        """Sums over all processes."""
        return self._reduced(numbers, device, "sum")

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest over all processes."""
        return self._reduced([number], device, "min")[0]

    def _reduced(self, numbers: Iterable[int], device: torch.device, how: str) -> list[int]:
        if self.size == 1:
            return list(numbers)
        reduced = torch.tensor(list(numbers), device=device)
        with _together():
            dist.all_reduce(reduced, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MIN)
        return list(map(int, reduced.tolist()))


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, count: int) -> Tensor:
        ctx.world, ctx.share = world, len(rows)
        with _together():
            return gather_rows(rows, [len(rows)] * world.size)[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        own = grad[ctx.world.rank * ctx.share :][: ctx.share] * ctx.world.size
        padded = grad.new_zeros(ctx.share, *grad.shape[1:])
        padded[: len(own)] = own
        return padded, None, None


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ProcessLost(
            f"another process of the run has ended, its message says why ({reason})"
        ) from error


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def device_of_process(device: torch.device) -> torch.device:
    """The device of this process, given the one that was asked for: each has a GPU of its own."""
    if launched() and device.type not in ("cpu", "meta") and device.index is None:
        return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
    return device


def join(device: torch.device) -> World:
    """Join the other processes of the run, if there are any; a default group that exists is used.

    Args:
        device: of this process; decides between NCCL (or what its kind of device has) and gloo.

    Raises:
        InputError: the environment names no place to meet, or a device is missing.
    """
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    if not launched():
        return World()
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: {', '.join(missing)} not set; start the "
            f"processes with torchrun --nproc-per-node N -m mulki run ..., or unset WORLD_SIZE"
        )
    if device.type == "cuda":
        here = torch.cuda.device_count()
        if (device.index or 0) >= here:
            raise InputError(
                f"--device: this machine has {here} GPUs and this is its process number "
                f"{(device.index or 0) + 1}; pass --nproc-per-node {here}, or --device cpu"
            )
        torch.cuda.set_device(device)
    backend = dist.get_default_backend_for_device(device)
    bound = device if device.type == "cuda" else None
    dist.init_process_group(backend, device_id=bound)
    return World(dist.get_rank(), dist.get_world_size(), joined=True)
