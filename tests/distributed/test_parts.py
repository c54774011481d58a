"""Whole tensors from sharded ones, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mulki.distributed.parts import set_whole
from tests.ranks import run_ranks


def there_and_back(rank: int, world: int) -> tuple[Any, Any]:
    whole = torch.arange(15.0).view(5, 3)
    mesh = init_device_mesh("cpu", (world,))
    sharded = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])
    set_whole(sharded, whole)
    part = sharded.to_local().clone()
    set_whole(sharded, distribute_tensor(2 * whole, mesh, [Shard(0)]))
    return part, sharded.full_tensor()


def test_each_process_has_its_part() -> None:
    whole = torch.arange(15.0).view(5, 3)
    (first, doubled), (second, _) = run_ranks(2, there_and_back)
    assert torch.equal(torch.cat([first, second]), whole) and len(first) == 3
    assert torch.equal(doubled, 2 * whole)


def test_what_is_whole_stays_so() -> None:
    whole = torch.ones(2)
    set_whole(whole, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(whole, torch.zeros(2))
