"""The backend of sharded runs on CPUs: its threads and devices, and what it gathers."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mulki.distributed import one_thread_gloo
from tests.ranks import run_ranks


def gather_many(rank: int, world: int, interfaces: str | None) -> int:
    if interfaces is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interfaces
    group = dist.new_group(backend=one_thread_gloo.name(), timeout=timedelta(seconds=77))
    mesh = DeviceMesh.from_group(group, "cpu")
    # With torch's own threads this crashes now and then.
    for value in range(100):
        parts = [DTensor.from_local(torch.full((2,), rank + value), mesh, [Shard(0)])] * 4
        wanted = [each + value for each in range(world) for _ in range(2)]
        assert all(part.full_tensor().tolist() == wanted for part in parts)
    options = group._get_backend(torch.device("cpu")).options
    assert options._threads == 1 and options._timeout == timedelta(seconds=77)
    return len(options._devices)


# By the order in which the system finds its interfaces.
LOOPBACK = socket.if_nameindex()[0][1]


@pytest.mark.parametrize(
    "interfaces, devices", [(None, 1), ("", 1), (LOOPBACK, 1), (f"{LOOPBACK},{LOOPBACK}", 2)]
)
def test_tensors_are_gathered_by_one_thread(interfaces: str | None, devices: int) -> None:
    assert run_ranks(2, gather_many, interfaces) == [devices, devices]
