"""Collectives on 2, 3 and 4 ranks of gloo, and alone."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mulki.distributed import collectives
from tests.ranks import run_ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = {1: [3], 2: [2, 5], 3: [3, 1, 4], 4: [2, 0, 3, 1]}


def parts(world: int, dtype: torch.dtype, width: int = 3) -> list[Tensor]:
    """What each rank holds: small integers, which every dtype holds exactly."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-8, 8, (n, width), generator=generator).to(dtype) for n in SIZES[world]]


def said(error: type[Exception], call) -> str:
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    return str(caught.value)


def check_everything(rank: int, world: int) -> dict[str, str]:
    warnings.simplefilter("error")
    assert collectives.world() == (rank, world)
    gathers(rank, world)
    rings(rank, world)
    sums(rank, world)
    messages = disagreements(rank, world)
    assert collectives.agree(rows=rank) == list(range(world))  # and the group still works
    return messages


def gathers(rank: int, world: int) -> None:
    sizes = collectives.agree(rows=SIZES[world][rank], dtype=torch.float32)
    assert sizes == SIZES[world]
    for dtype in DTYPES:
        held = parts(world, dtype)
        assert torch.equal(collectives.gather_rows(held[rank], sizes), torch.cat(held))
        own = held[rank].clone().requires_grad_()
        gathered = collectives.gather_rows_with_grad(own, sizes)
        assert torch.equal(gathered, torch.cat(held)) and gathered.dtype == dtype
        assert not collectives.gather_rows(own, sizes).requires_grad
        # Rank r's loss weighs row i by r + i: the gradient of row i is the sum over r.
        weights = torch.arange(len(gathered)).unsqueeze(1).to(dtype)
        ((rank + weights) * gathered).sum().backward()
        start = sum(sizes[:rank])
        expected = sum(r + weights[start : start + sizes[rank]] for r in range(world))
        assert own.grad is not None and torch.equal(own.grad, expected.expand_as(own))
    for other in (torch.bool, torch.int64):
        held = parts(world, other)
        assert torch.equal(collectives.gather_rows(held[rank], sizes), torch.cat(held))
    held = [part[:, 0] for part in parts(world, torch.float32)]  # one dimension, not contiguous
    assert torch.equal(collectives.gather_rows(held[rank], sizes), torch.cat(held))
    wrong = [n + 1 for n in sizes]
    assert "sizes" in said(ValueError, lambda: collectives.gather_rows(held[rank], wrong))


def rings(rank: int, world: int) -> None:
    sizes = SIZES[world]
    for dtype in DTYPES:
        held = parts(world, dtype)
        before, after = (rank - 1) % world, (rank + 1) % world
        one = held[rank].clone().requires_grad_()
        other = (2 * held[rank]).requires_grad_()
        came = collectives.ring_pass([one, other], (1, -1), (sizes[before], sizes[after]))
        assert torch.equal(came[0], held[before]) and torch.equal(came[1], 2 * held[after])
        (came[0].sum() * (rank + 1) + came[1].sum() * 10 * (rank + 1)).backward()
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, torch.full_like(one, after + 1))
        assert torch.equal(other.grad, torch.full_like(other, 10 * (before + 1)))


def sums(rank: int, world: int) -> None:
    values = torch.tensor([rank, 1.0], requires_grad=True)
    total = collectives.sum_of_ranks(values)
    assert total.tolist() == [sum(range(world)), world] and not total.requires_grad
    assert values.tolist() == [rank, 1.0]


def disagreements(rank: int, world: int) -> dict[str, str]:
    last = world - 1
    return {
        "width": said(
            ValueError, lambda: collectives.agree(rows=2, width=64 if rank == last else 32, a=1)
        ),
        "dtype": said(
            TypeError,
            lambda: collectives.agree(
                rows=2, dtype=torch.float32 if rank == last else torch.bfloat16
            ),
        ),
        "missing": said(
            ValueError, lambda: collectives.agree(rows=2, **({"x": 1} if rank else {}))
        ),
        "value": said(
            ValueError,
            lambda: collectives.agree(
                rows=2, problem=ValueError("features: “bad”") if rank == last else None
            ),
        ),
        "type": said(
            TypeError,
            lambda: collectives.agree(rows=0, problem=TypeError("x" * 5000) if rank else None),
        ),
        "long": said(
            ValueError, lambda: collectives.agree(rows=2, text="y" * (2000 if rank else 1))
        ),
    }


@pytest.mark.parametrize("world", [2, 3, 4])
def test_collectives_on_ranks_of_gloo(world: int) -> None:
    messages = run_ranks(world, check_everything)
    first = messages[0]
    assert all(other == first for other in messages)  # the same error on every rank
    last = world - 1
    most = "rank 0" if world == 2 else "ranks " + ", ".join(map(str, range(last)))
    assert (
        first["width"]
        == f"width: got 32 on {most}, 64 on rank {last}, wanted the same on all ranks"
    )
    assert f"torch.bfloat16 on {most}, torch.float32 on rank {last}" in first["dtype"]
    assert first["missing"].startswith("x: got nothing on rank 0, 1 on rank")
    assert first["value"] == f"on rank {last}: features: ?bad?"
    assert first["type"].startswith("on rank 1: xxx") and len(first["type"]) < 500
    assert first["long"].startswith("on rank 1: ") and "bytes of facts" in first["long"]


def in_a_subgroup(rank: int, world: int) -> str:
    pair = dist.new_group([1, 2])
    if rank == 0:
        return said(ValueError, lambda: collectives.world(pair))
    assert collectives.world(pair) == (rank - 1, 2)
    sizes = collectives.agree(pair, rows=rank)
    rows = torch.full((rank, 1), float(rank), requires_grad=True)
    gathered = collectives.gather_rows_with_grad(rows, sizes, pair)
    assert gathered.flatten().tolist() == [1.0, 2.0, 2.0]
    (came,) = collectives.ring_pass([rows], [1], [sizes[2 - rank]], pair)
    assert set(came.flatten().tolist()) == {3.0 - rank}
    (gathered.sum() + came.sum()).backward()
    assert rows.grad is not None and rows.grad.unique().tolist() == [3.0]
    return ""


def test_collectives_in_a_part_of_the_ranks() -> None:
    assert run_ranks(3, in_a_subgroup)[0].startswith("group: this process is not in it")


def test_collectives_alone_are_the_identity() -> None:
    check = parts(1, torch.float32)[0].requires_grad_()
    assert collectives.world() == (0, 1)
    assert collectives.agree(rows=3, width=4) == [3]
    gathered = collectives.gather_rows_with_grad(check, [3])
    (came,) = collectives.ring_pass([check], [1], [3])
    assert torch.equal(gathered, check) and torch.equal(came, check)
    (gathered.sum() + 2 * came.sum()).backward()
    assert torch.equal(check.grad, torch.full_like(check, 3.0))
    assert collectives.sum_of_ranks(check).tolist() == check.tolist()
    with pytest.raises(TypeError, match="of one rank"):
        collectives.agree(rows=1, problem=TypeError("of one rank"))
