"""Collectives over the ranks of a process group, the same code for gloo, NCCL and the others.

Ranks may hold different numbers of rows. `agree` is called first: it returns the row counts of all
ranks, or raises the same error on all of them if they cannot go on together. The other functions
take these row counts. Without a process group, or in a group of one, every function is the
identity. All ranks of the group have to call them in the same order. The differentiable ones
communicate in the backward pass too, so every rank has to differentiate through their results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, which a build without distribution does not have

# Bytes of the message of each rank in `agree`. A constant, since no size is known to all before.
_MESSAGE_BYTES = 1024


class Position(NamedTuple):
    """This process among those of its group."""

    rank: int
    size: int


def world(group: Group | None = None) -> Position:
    """Rank in the group (the default one if None) and its size; (0, 1) without distribution."""
    if not (dist.is_available() and dist.is_initialized()):
        return Position(0, 1)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is not in it; call this on the group's ranks alone")
    return Position(rank, dist.get_world_size(group))


def agree(
    group: Group | None = None,
    *,
    rows: int,
    device: torch.device | None = None,
    problem: Exception | None = None,
    **facts: object,
) -> list[int]:
    """The row counts of all ranks, or the same error on all of them.

    One collective of 1 KiB per rank. It runs on the CPU if the group has a backend for it (as
    torchrun's default, gloo beside NCCL, has), and does not wait for a GPU then.

    Args:
        group: the process group, the default one if None.
        rows: how many rows this rank holds; ranks may differ.
        device: where this rank's tensors are, for a group that has no backend for the CPU; the
            current accelerator if None.
        problem: a TypeError or ValueError from this rank's check of its arguments. If this rank
            raised it without telling the others, they would wait forever.
        **facts: what must be the same on every rank, by name: the width, the dtype, options.

    Raises:
        TypeError, ValueError: on all ranks, naming ranks and values, if one has a problem or if a
            fact differs; a TypeError if that is a dtype or the problem of the first rank with one
            is a TypeError.
    """
    if world(group).size == 1:
        if problem is not None:
            raise problem
        return [rows]
    sent = _message(rows, facts, problem)
    messages = [json.loads(text) for text in _exchange(sent, device, group)]
    for rank, message in enumerate(messages):
        if message["problem"]:
            error = TypeError if message["is_type"] else ValueError
            raise error(f"on rank {rank}: {message['problem']}") from problem
    names = dict.fromkeys(name for message in messages for name in message["facts"])
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, message in enumerate(messages):
            ranks.setdefault(message["facts"].get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            came = ", ".join(f"{value} on {_listed(where)}" for value, where in ranks.items())
            raise (TypeError if "dtype" in name else ValueError)(
                f"{name}: got {came}, wanted the same on all ranks"
            )
    return [message["rows"] for message in messages]


def _message(rows: int, facts: dict[str, object], problem: Exception | None) -> bytes:
    is_type = isinstance(problem, TypeError)
    text = str(problem).encode("ascii", "replace").decode()
    content: dict[str, object] = {
        "rows": rows,
        "is_type": is_type,
        "problem": problem and text[:400],
        "facts": {name: str(value) for name, value in facts.items()},
    }
    message = json.dumps(content).encode()
    if len(message) <= _MESSAGE_BYTES:
        return message
    # Sent and not raised here, since the other ranks would wait forever.
    too_long = (
        f"{len(message)} bytes of facts, wanted at most {_MESSAGE_BYTES}; pass fewer or shorter"
    )
    content |= {"facts": {}, "problem": text[:400] if problem else too_long}
    return json.dumps(content).encode()


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _exchange(message: bytes, device: torch.device | None, group: Group | None) -> list[bytes]:
    size = world(group).size
    if "cpu:" in dist.get_backend_config(group):
        device = torch.device("cpu")
    elif device is None or device.type == "cpu":  # a caller's tensors on the CPU are refused later
        device = torch.accelerator.current_accelerator()
    padded = bytearray(message.ljust(_MESSAGE_BYTES))
    sent = torch.frombuffer(padded, dtype=torch.uint8).to(device)
    received = torch.empty(size * _MESSAGE_BYTES, dtype=torch.uint8, device=device)
    _collective("all_gather_single", "all_gather_into_tensor")(received, sent, group=group)
    return [row.numpy().tobytes() for row in received.cpu().view(size, _MESSAGE_BYTES)]


def _collective(name: str, before: str) -> Callable[..., Any]:
    # torch 2.13 gave these functions new names and warns about the old ones.
    return getattr(dist, name, None) or getattr(dist, before)


def gather_rows(
    rows: Tensor,  # [n, ...], n = sizes[rank]
    sizes: Sequence[int],
    group: Group | None = None,
) -> Tensor:  # [sum(sizes), ...]
    """The rows of all ranks in the order of the ranks; no gradient flows through it.

    Args:
        rows: any shape and dtype; all but the row count must be the same on every rank.
        sizes: the row counts of all ranks, as `agree` gives them.
    """
    with torch.no_grad():
        return _gather(rows.detach(), sizes, group)


def gather_rows_with_grad(
    rows: Tensor,  # [n, ...], n = sizes[rank]
    sizes: Sequence[int],
    group: Group | None = None,
) -> Tensor:  # [sum(sizes), ...]
    """`gather_rows`, differentiable.

    The gradient of a rank's rows is that of the sum of all ranks' losses. Half-precision gradients
    are summed in float32.
    """
    return _GatherRows.apply(rows, tuple(sizes), group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...], group: Group | None) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather(rows, sizes, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_sum(grad, ctx.sizes, ctx.group), None, None


def _gather(rows: Tensor, sizes: Sequence[int], group: Group | None) -> Tensor:
    rank, size = world(group)
    if size == 1:
        return rows.clone()
    _check_sizes(rows.shape[0], sizes, rank, size)
    most = max(sizes)
    sent = rows.contiguous()
    if len(sent) < most:
        sent = sent.new_zeros((most, *rows.shape[1:]))
        sent[: len(rows)] = rows
    out = sent.new_empty((size * most, *rows.shape[1:]))
    _collective("all_gather_single", "all_gather_into_tensor")(out, sent, group=group)
    if min(sizes) == most:
        return out
    return torch.cat([part[:n] for part, n in zip(out.split(most), sizes, strict=True)])


def _scatter_sum(grad: Tensor, sizes: Sequence[int], group: Group | None) -> Tensor:
    # This rank's rows of the sum of all ranks' gradients [sum(sizes), ...].
    rank, size = world(group)
    if size == 1:
        return grad
    most = max(sizes)
    dtype = grad.dtype if grad.dtype == torch.float64 else torch.float32
    if min(sizes) == most:
        parts = grad.to(dtype).contiguous()
    else:
        parts = grad.new_zeros((size * most, *grad.shape[1:]), dtype=dtype)
        for to, part in zip(parts.split(most), grad.split(list(sizes)), strict=True):
            to[: len(part)] = part
    received = parts.new_empty((most, *grad.shape[1:]))
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(received, parts, group=group)
    return received[: sizes[rank]].to(grad.dtype)


def _check_sizes(rows: int, sizes: Sequence[int], rank: int, size: int) -> None:
    if len(sizes) != size or sizes[rank] != rows:
        raise ValueError(
            f"sizes: got {list(sizes)} for {rows} rows on rank {rank} of {size}, wanted the row "
            f"counts of all ranks as agree() gives them"
        )


def sum_of_ranks(values: Tensor, group: Group | None = None) -> Tensor:
    """The sum of all ranks' tensors of one shape, a new tensor without a gradient."""
    total = values.detach().clone()
    if world(group).size > 1:
        dist.all_reduce(total, group=group)
    return total


def ring_pass(
    blocks: Sequence[Tensor],  # each [n_i, ...]
    steps: Sequence[int],
    incoming: Sequence[int],
    group: Group | None = None,
) -> tuple[Tensor, ...]:  # each [incoming_i, ...]
    """Send each block to the rank `steps_i` further round the ring, and receive as many blocks.

    Differentiable: the gradient of a received block goes back to its sender. All blocks are sent at
    once, so with steps (1, -1) both directions of the links are used.

    Args:
        blocks: one or more; the dtype and the shape after the rows are the same on every rank.
        steps: how far each block goes; 1 is to the next rank, -1 to the one before.
        incoming: the row counts of the received blocks, known from `agree`.
    """
    return _RingPass.apply(tuple(steps), tuple(incoming), group, *blocks)


class _RingPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        steps: tuple[int, ...],
        incoming: tuple[int, ...],
        group: Group | None,
        *blocks: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.steps, ctx.group = steps, group
        ctx.outgoing = tuple(len(block) for block in blocks)
        return _pass(blocks, steps, incoming, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = tuple(-step for step in ctx.steps)
        return None, None, None, *_pass(grads, back, ctx.outgoing, ctx.group)


def _pass(
    blocks: Sequence[Tensor], steps: Sequence[int], incoming: Sequence[int], group: Group | None
) -> tuple[Tensor, ...]:
    rank, size = world(group)
    if size == 1:
        return tuple(block.clone() for block in blocks)
    received = tuple(
        block.new_empty((n, *block.shape[1:])) for block, n in zip(blocks, incoming, strict=True)
    )
    # Messages between two ranks arrive in the order in which they were sent. Empty blocks are not
    # sent.
    sends = [
        dist.P2POp(dist.isend, block.contiguous(), group=group, group_peer=(rank + step) % size)
        for block, step in zip(blocks, steps, strict=True)
        if block.numel()
    ]
    receives = [
        dist.P2POp(dist.irecv, block, group=group, group_peer=(rank - step) % size)
        for block, step in zip(received, steps, strict=True)
        if block.numel()
    ]
    if sends or receives:
        for request in dist.batch_isend_irecv(sends + receives):
            request.wait()
    return received
