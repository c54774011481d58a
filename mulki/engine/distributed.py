"""One run on many processes, with the results of one process that has the same global batch.

Encoding is shared out: every process encodes its part of the batch, of the class texts and of what
the teachers are asked, and the features are exchanged. The losses are then computed on the whole
batch by every process, from the same numbers, so that a method needs to know nothing of this, and
its state (prototypes, running means) stays the same everywhere. A gradient that reaches features is
cut to the process's own rows and multiplied by the number of processes; gradients of parameters are
averaged. So what the losses send to a parameter directly counts once, and what goes through an
encoder adds up. Random numbers are for encoders alone: each process draws its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mulki.collectives import agree, gather_rows
from mulki.errors import InputError, ProcessLost
from mulki.evaluate import encode_all_texts
from mulki.models import VisionLanguageModel

# Elements in one reduction of gradients: large enough for the network, small beside a model.
_BUCKET = 2**25

# Seconds; microseconds do unless many processes share a core.
_LETTING_GO_S = 0.2


class World:
    """The processes of a run; as a context manager it leaves them when `join` has joined them.

    Leaving, it raises `ProcessLost` in place of what a collective raises when another process has
    ended.

    Args:
        rank: of this process, from 0.
        size: how many there are. Processes of more than one must be in the default process group.
        joined: whether the process group was made for this run and ends with it.
    """

    def __init__(self, rank: int = 0, size: int = 1, joined: bool = False):
        self.rank = rank
        self.size = size
        self._joined = joined

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._joined:
            try:
                if error is not None and dist.group.WORLD is not None:
                    # The others may never join what this process has begun, and leaving waits for
                    # it.
                    dist.group.WORLD.abort()
                dist.destroy_process_group()
            finally:
                # What FSDP2 caches keeps the group alive and gloo's threads with it. They let go of
                # the last collective's tensors after their caller has gone on, and need the
                # interpreter to do so: a process that has begun to leave it by then is aborted.
                # Nothing tells when they have; torch has no call that ends them.
                time.sleep(_LETTING_GO_S)
        if self.size > 1 and isinstance(error, RuntimeError) and _is_lost(error):
            reason = (str(error).splitlines() or [""])[0]
            raise ProcessLost(
                f"another process of the run has ended, its message says why ({reason})"
            ) from error

    def agree(self, device: torch.device, problem: InputError | None, **facts: object) -> None:
        """Return in all processes or in none.

        Args:
            device: of this process.
            problem: what keeps it from going on, if anything does.
            **facts: what has to be the same in all processes, by name, as short texts.

        Raises:
            InputError: in every process: its own problem, or that of another, or facts that differ.
        """
        if self.size == 1:
            if problem is not None:
                raise problem
            return
        try:
            agree(rows=0, device=device, problem=problem, **facts)
        except (TypeError, ValueError) as error:
            raise (problem or InputError(str(error))) from None

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
                # In half precision a sum can overflow, and rounds for each process.
                flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
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
        return gather_rows(rows, [len(rows)] * world.size)[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        own = grad[ctx.world.rank * ctx.share :][: ctx.share] * ctx.world.size
        padded = grad.new_zeros(ctx.share, *grad.shape[1:])
        padded[: len(own)] = own
        return padded, None, None


def _is_lost(error: RuntimeError) -> bool:
    # gloo raises nothing of its own, but names the place in its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def text_inputs(model: VisionLanguageModel, prompts: Sequence[str], world: World) -> Tensor:
    """`model.text_inputs` of all prompts, each process making its share."""
    share = [prompts[row] for row in world.rows(len(prompts))]
    return world.gather(model.text_inputs(share), len(prompts))


def text_features(model: VisionLanguageModel, inputs: Tensor, world: World) -> Tensor:
    """`encode_all_texts` of what `text_inputs` returned, each process encoding its share."""
    return world.gather(encode_all_texts(model, world.part(inputs)), len(inputs))


def launched() -> bool:
    """Whether this process is one of several, started by torchrun or in a default group."""
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes_here() -> int:
    """The processes of the run on this machine, as torchrun tells them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


def device_of_process(device: torch.device) -> torch.device:
    """The device of this process, given the one that was asked for: each has a GPU of its own.

    Raises:
        InputError: one GPU was named for several processes, or there are fewer than processes.
    """
    if not launched() or device.type in ("cpu", "meta"):
        return device
    if device.index is not None:
        if processes_here() > 1:
            raise InputError(
                f"--device: {device} is one device, and this machine has {processes_here()} "
                f"processes of the run; pass --device {device.type}"
            )
        return device
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        here = torch.cuda.device_count()
        if index >= here:
            raise InputError(
                f"--device: this machine has {here} GPUs and this is its process number "
                f"{index + 1}; pass --nproc-per-node {here}, or --device cpu"
            )
    return torch.device(device.type, index)


def join(device: torch.device) -> World:
    """Join the other processes of the run, if there are any; a default group that exists is used.

    Args:
        device: of this process; decides between NCCL (or what its kind of device has) and gloo.

    Raises:
        InputError: the environment names no place to meet.
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
    backend = dist.get_default_backend_for_device(device)
    bound = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # What is on the CPU has gloo, as torchrun's default does it.
        backend, bound = f"cpu:gloo,cuda:{backend}", device
    dist.init_process_group(backend, device_id=bound)
    return World(dist.get_rank(), dist.get_world_size(), joined=True)
