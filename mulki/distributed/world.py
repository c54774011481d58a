"""The processes of a run, with the results of one process that has the same global batch.

The work of the encoders is divided: every process encodes its part of each batch and of the class
texts, and the features of all processes are gathered. Every process then computes the losses of the
whole batch from the same numbers. So a method needs to know nothing of processes, and its state
(prototypes, running means) is the same in all of them.

Gradients follow from that. The gradient with respect to gathered features is cut to the process's
own rows and multiplied by the number of processes; the gradients of parameters are averaged over
the processes. So a parameter that the losses use directly gets its gradient once, and what goes
through an encoder is summed over the processes. Every process draws its own random numbers, which
only encoders and `Method.inputs` use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mulki.distributed.collectives import agree, gather_rows
from mulki.distributed.roll_call import RollCall
from mulki.errors import InputError, ProcessLost

# Elements in one reduction of gradients: large enough for the network, small beside a model.
_BUCKET = 2**25

# Seconds that gloo's threads get to release the last tensors; microseconds are enough unless many
# processes share a core.
_RELEASE_S = 0.2


class World:
    """The processes of a run, and what they exchange.

    As a context manager it is `watched`, and at its end it leaves the process group if `joined`.

    Args:
        rank: number of this process, from 0.
        size: number of processes. If it is more than one, they are in the default process group.
        joined: whether the process group was made for this run and ends with it.
        roll: what the processes say before they end, of a process group that mulki has made.
        hold: called before this process waits for what the others say; lets signals wait.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        joined: bool = False,
        roll: RollCall | None = None,
        hold: Callable[[], None] = lambda: None,
    ):
        self.rank = rank
        self.size = size
        self._joined = joined
        self._roll = roll
        self._hold = hold

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        lost = None if error is None else self._told(error)
        if self._joined:
            try:
                self._leave(aborted=error is not None)
            finally:
                # The caches of FSDP2 keep the group and its gloo threads alive. A thread releases
                # the tensors of the last collective after the call has returned, and it needs the
                # interpreter for that: if the interpreter is shutting down by then, the process is
                # aborted. torch has no call that waits for these threads or ends them.
                time.sleep(_RELEASE_S)
        if lost is not None:
            raise lost from error

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Tell the other processes at once of an error in the block, before anything is cleaned up.

        Raises:
            ProcessLost: in place of the error of a collective that failed because another process
                has ended, and of a signal that came for that reason.
        """
        try:
            yield
        except BaseException as error:
            lost = self._told(error)
            if lost is not None:
                raise lost from error
            raise

    def _told(self, error: BaseException) -> ProcessLost | None:
        # What to raise in place of an error, which the others are told of.
        if self.size == 1 or isinstance(error, ProcessLost):
            return None
        lost = isinstance(error, RuntimeError) and _is_lost(error)
        stopped = isinstance(error, KeyboardInterrupt)
        reason = (str(error).splitlines() or [""])[0]
        if not (lost or stopped or isinstance(error, InputError)):
            reason = f"{type(error).__name__}: {reason}"
        if self._roll is None:
            generic = f"another process of the run has ended, its message says why ({reason})"
            return ProcessLost(generic) if lost else None
        # What starts the processes sends a signal to those that are left when one has ended.
        self._hold()
        self._roll.say("lost" if lost else "stopped" if stopped else "failed", reason)
        # Those that wait for this process notice when its connections close.
        self._leave(aborted=True)
        return self._roll.call(reason, stopped) if lost or stopped else None

    def _leave(self, aborted: bool) -> None:
        if dist.group.WORLD is None:
            return  # left already
        if aborted:
            # Leaving waits for collectives that this process has started and that the others may
            # never join.
            dist.group.WORLD.abort()
        dist.destroy_process_group()

    def agree(self, device: torch.device, problem: InputError | None, **facts: object) -> None:
        """Check that all processes can go on; if one cannot, all raise an error.

        Args:
            device: of this process.
            problem: the error that stops this process, if there is one.
            **facts: what has to be the same in all processes, by name, as short texts.

        Raises:
            InputError: in every process: its own problem, that of another one, or facts that
                differ.
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
        """The places, among `count` rows, of this process's part.

        All parts have the same length and are in order. If `count` is not a multiple of the number
        of processes, the last row is repeated; `gather` leaves the repetitions out.
        """
        length = -(-count // self.size)
        return [min(self.rank * length + i, count - 1) for i in range(length)]

    def distinct(self, count: int) -> int:
        """How many of `rows(count)` are not repetitions; these come first."""
        length = -(-count // self.size)
        return max(0, min(length, count - self.rank * length))

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of the rows of a tensor that all processes have."""
        return whole if self.size == 1 else whole[self.rows(len(whole))]

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows, in order, from the parts of all processes.

        Differentiable, with the gradients that the module's docstring describes: every process has
        to compute the same loss, and gradients of parameters have to be averaged.
        """
        if self.size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self, count)
        return gathered

    def each(self, value: Any) -> list[Any]:
        """What each process has as `value`, by number. All processes have to call this."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

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
                sizes = [g.numel() for g in bucket]
                for gradient, mean in zip(bucket, flat.split(sizes), strict=True):
                    gradient.copy_(mean.view_as(gradient))

    def total(self, *numbers: int, device: torch.device) -> list[int]:
        """The sums of the numbers over all processes."""
        return self._reduced(numbers, device, "sum")

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of the numbers that the processes pass."""
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
        ctx.world, ctx.length = world, len(rows)
        return gather_rows(rows, [len(rows)] * world.size)[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        part = grad[ctx.world.rank * ctx.length :][: ctx.length] * ctx.world.size
        padded = grad.new_zeros(ctx.length, *grad.shape[1:])
        padded[: len(part)] = part
        return padded, None, None


def _is_lost(error: RuntimeError) -> bool:
    # gloo has no error type of its own; its messages name a file of its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


#: The world of a process that runs alone.
ALONE = World()
