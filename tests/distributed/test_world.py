"""The processes of a run: their parts of a batch, what they exchange, and how they end."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from mulki.distributed.world import World
from mulki.errors import InputError, ProcessLost
from tests.ranks import run_ranks


def test_one_process_is_a_world_of_its_own() -> None:
    world, rows = World(), torch.eye(3)
    assert world.rows(3) == [0, 1, 2] and world.distinct(3) == 3
    assert world.gather(rows, 3) is rows and world.part(rows) is rows
    assert world.total(3, 4, device=torch.device("cpu")) == [3, 4]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_parts_are_equal_and_cover_all(size: int, count: int) -> None:
    parts = [World(rank, size) for rank in range(size)]
    assert len({len(w.rows(count)) for w in parts}) == 1
    rows = [row for w in parts for row in w.rows(count)]
    assert rows[:count] == list(range(count)) and set(rows[count:]) <= {count - 1}
    assert [w.rows(count)[: w.distinct(count)] for w in parts] == [
        [r for r in range(count) if r // len(w.rows(count)) == w.rank] for w in parts
    ]


def test_only_a_broken_connection_is_a_lost_process() -> None:
    closed = "[/gloo/pair.cc:5] Connection closed by peer"
    with pytest.raises(ProcessLost, match="has ended.*" + re.escape(closed)), World(0, 2):
        raise RuntimeError(closed + "\nmore")
    with pytest.raises(ProcessLost), World(0, 2):
        raise torch.distributed.DistBackendError("NCCL error")
    with pytest.raises(RuntimeError, match="^sizes differ"), World(0, 2):
        raise RuntimeError("sizes differ")


def test_alone_a_problem_is_raised() -> None:
    world, cpu = World(), torch.device("cpu")
    world.agree(cpu, None, tasks="two")
    with pytest.raises(InputError, match="taken"):
        world.agree(cpu, InputError("taken"))


def check_rows(rank: int, size: int) -> None:
    world = World(rank, size)
    for count in (1, 2, 3, 5, 8):
        whole = torch.arange(3.0 * count).view(count, 3) + 1
        weight = nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
        direct = nn.Parameter(torch.tensor(3.0))
        encoded = world.part(whole) * weight
        gathered = world.gather(encoded, count)
        assert gathered.shape == whole.shape
        assert torch.equal(gathered.detach(), whole * weight.detach())
        assert sum(world.total(world.distinct(count), device=torch.device("cpu"))) == count
        loss = (gathered * torch.arange(1.0, count + 1).unsqueeze(1)).square().sum() * direct
        loss.backward()
        world.average([weight, direct])
        ours = [weight.grad, direct.grad]
        weight.grad = direct.grad = None
        rows = torch.arange(1.0, count + 1).unsqueeze(1)
        ((whole * weight * rows).square().sum() * direct).backward()
        for gradient, wanted in zip(ours, (weight.grad, direct.grad), strict=True):
            torch.testing.assert_close(gradient, wanted)
    assert world.smallest(world.rank + 4, torch.device("cpu")) == 4


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_gathered_rows_are_those_of_one_process(size: int) -> None:
    run_ranks(size, check_rows)


def check_agreement(rank: int, size: int) -> None:
    world, cpu = World(rank, size), torch.device("cpu")
    world.agree(cpu, None, tasks="two")
    problem = InputError("b: no such folder") if world.rank == 1 else None
    with pytest.raises(InputError, match="b: no such folder"):
        world.agree(cpu, problem, **({} if problem else {"tasks": "two"}))
    with pytest.raises(InputError, match="tasks: got 0 on rank 0, 1 on rank 1.*the same on all"):
        world.agree(cpu, None, tasks=world.rank)


@pytest.mark.parametrize("size", [2, 3])
def test_all_processes_go_on_or_all_have_the_same_error(size: int) -> None:
    run_ranks(size, check_agreement)
