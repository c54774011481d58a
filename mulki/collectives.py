"""Collectives over the ranks of a process group, the same code for gloo, NCCL and the others.

Ranks may hold different numbers of rows. `agree` is called first: it tells every rank what all of
them hold, or raises the same error on all of them where they cannot go on together. The others
take the row counts that it gives. Without a process group, or alone in one, all of them are the
identity. Every rank of the group has to call them, in the same order; a differentiable one is a
collective in backward too, so its result must be used in what every rank differentiates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, which a build without distribution does not have

# Bytes that a rank tells the others of itself; a constant, for nothing is agreed before.
_TOLD = 1024


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
    """The row counts of all ranks, once it is clear that all of them can go on.

    One collective of 1 KiB per rank. It runs on the CPU if the group has a backend for it (as
    torchrun's default, gloo beside NCCL, has), and does not wait for a GPU then.

    Args:
        group: the process group, the default one if None.
        rows: how many rows this rank holds; ranks may differ.
        device: where this rank's tensors are, for a group that has no backend for the CPU; the
            current accelerator if None.
        problem: a TypeError or ValueError that this rank met while it checked its arguments. A
            rank that raised it alone would leave the others waiting.
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
    heard = [json.loads(text) for text in _exchange(_told(rows, facts, problem), device, group)]
    for rank, one in enumerate(heard):
        if one["problem"]:
            error = TypeError if one["is_type"] else ValueError
            raise error(f"on rank {rank}: {one['problem']}") from problem
    names = dict.fromkeys(name for one in heard for name in one["facts"])
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(heard):
            ranks.setdefault(one["facts"].get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            came = ", ".join(f"{value} on {_listed(where)}" for value, where in ranks.items())
            raise (TypeError if "dtype" in name else ValueError)(
                f"{name}: got {came}, wanted the same on all ranks"
            )
    return [one["rows"] for one in heard]


def _told(rows: int, facts: dict[str, object], problem: Exception | None) -> bytes:
    is_type = isinstance(problem, TypeError)
    text = str(problem).encode("ascii", "replace").decode()
    told: dict[str, object] = {"rows": rows, "is_type": is_type, "problem": problem and text[:400]}
    told["facts"] = {name: str(value) for name, value in facts.items()}
    message = json.dumps(told).encode()
    if len(message) <= _TOLD:
        return message
    # Raised here, it would leave the other ranks waiting.
    too_long = f"{len(message)} bytes of facts, wanted at most {_TOLD}; pass fewer or shorter ones"
    return json.dumps(
        {**told, "facts": {}, "problem": text[:400] if problem else too_long}
    ).encode()


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _exchange(own: bytes, device: torch.device | None, group: Group | None) -> list[bytes]:
    size = world(group).size
    if "cpu:" in dist.get_backend_config(group):
        device = torch.device("cpu")
    elif device is None or device.type == "cpu":  # tensors at the wrong place, soon to be refused
        device = torch.accelerator.current_accelerator()
    sent = torch.frombuffer(bytearray(own.ljust(_TOLD)), dtype=torch.uint8).to(device)
    heard = torch.empty(size * _TOLD, dtype=torch.uint8, device=device)
    _collective("all_gather_single", "all_gather_into_tensor")(heard, sent, group=group)
    return [one.numpy().tobytes() for one in heard.cpu().view(size, _TOLD)]


def _collective(name: str, before: str) -> Callable[..., Any]:
    # torch 2.13 renamed these, and warns of the old names.
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
    """`gather_rows`, differentiable: the gradients of all ranks by one's rows are summed.

    So each rank gets the gradient of the sum of all ranks' losses by its own rows. Half-precision
    gradients are summed in float32.
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
    """This rank's rows of the sum of all ranks' gradients [sum(sizes), ...]."""
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
    own = parts.new_empty((most, *grad.shape[1:]))
    _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, parts, group=group)
    return own[: sizes[rank]].to(grad.dtype)


def _check_sizes(rows: int, sizes: Sequence[int], rank: int, size: int) -> None:
    if len(sizes) != size or sizes[rank] != rows:
        raise ValueError(
            f"sizes: got {list(sizes)} for {rows} rows on rank {rank} of {size}, wanted the row "
            f"counts of all ranks as agree() gives them"
        )


def sum_of_ranks(values: Tensor, group: Group | None = None) -> Tensor:
    """The sum of all ranks' tensors of one shape, without a gradient; `values` stay as they are."""
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
    """Give each block to the rank `steps_i` further round the ring, and take what comes.

    Differentiable: the gradient of what came goes back to the rank it came from. All blocks travel
    at once, so with steps (1, -1) both directions of the links are used.

    Args:
        blocks: one or more; dtype and shape behind the rows are the same on every rank.
        steps: how far each goes; 1 is to the next rank, -1 to the one before.
        incoming: the row counts of the blocks that come, known from `agree`.
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
    came = tuple(
        block.new_empty((n, *block.shape[1:])) for block, n in zip(blocks, incoming, strict=True)
    )
    # Messages between two ranks arrive in the order in which they were sent. Empty ones are not.
    sends = [
        dist.P2POp(dist.isend, block.contiguous(), group=group, group_peer=(rank + step) % size)
        for block, step in zip(blocks, steps, strict=True)
        if block.numel()
    ]
    receives = [
        dist.P2POp(dist.irecv, block, group=group, group_peer=(rank - step) % size)
        for block, step in zip(came, steps, strict=True)
        if block.numel()
    ]
    if sends or receives:
        for request in dist.batch_isend_irecv(sends + receives):
            request.wait()
    return came
