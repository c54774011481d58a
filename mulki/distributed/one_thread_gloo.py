"""gloo with one thread in a process group; torch gives it two for each network interface.

After each collective a thread of torch's `ProcessGroupGloo` (`runLoop`, torch 2.11 and 2.13) writes
its name into a string that all threads share, without a lock. Collectives of DTensors, such as
`full_tensor()` of FSDP2's weights, have names so long that they lie on the heap
(ALLGATHER_COALESCED). When two threads replace one at the same time, both free it, and the process
crashes in a later allocation. This module can go as soon as torch takes a lock.

With one thread, collectives that were started together run one after another, and a callback of one
must not wait for another.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch.distributed as dist

_NAME = "one_thread_gloo"


@functools.cache
def name() -> str:
    """The backend's name, for `torch.distributed.init_process_group` with tensors on the CPU."""
    if not hasattr(dist.ProcessGroupGloo, "_Options"):
        return "gloo"  # a torch whose private names are others
    dist.Backend.register_backend(_NAME, _create, extended_api=True, devices=["cpu"])
    return _NAME


def _create(group: Any, options: object) -> dist.ProcessGroupGloo:
    gloo = dist.ProcessGroupGloo
    # The devices are those that torch takes.
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    devices = [gloo.create_device(interface=each) for each in interfaces if each]
    given = gloo._Options()  # type: ignore[attr-defined]
    given._devices = devices or [gloo.create_default_device()]
    given._threads = 1
    given._timeout = group.timeout
    return gloo(group.store, group.group_rank, group.group_size, given)
