"""How this process takes part in a run that torchrun started: its device, its `World`, restarts."""

from __future__ import annotations

import functools
import itertools
import os
import platform
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mulki.choices.options import whole_number
from mulki.distributed import one_thread_gloo
from mulki.distributed.roll_call import Meeting, RollCall, meet
from mulki.distributed.torchrun import launcher
from mulki.distributed.world import World
from mulki.errors import InputError

# The process group that `join` has made last, and its roll call.
_made: tuple[Any, RollCall] | None = None
# Groups of one process after another share a store.
_groups = itertools.count()

_REMEDY = "start the processes with torchrun --nproc-per-node N -m mulki run ..., or unset"


def processes() -> int:
    """How many processes the run has, by the default group or by torchrun's environment.

    Raises:
        InputError: the environment names no such number.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    return _number("WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"), least=1)


def _number(name: str, value: str, least: int, unset: str = "") -> int:
    """Of an environment variable; `unset` is the one without which it is not needed."""
    number = whole_number(value)
    if number is None or number < least:
        raise InputError(
            f"{name}: got {value!r}, wanted a whole number from {least}; {_REMEDY} {unset or name}"
        )
    return number


def launched() -> bool:
    """Whether this process is one of several, started by torchrun or in a default group."""
    return processes() > 1


def processes_here() -> int:
    """How many processes of the run are on this machine, from torchrun's environment."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "1") if launched() else "1"
    return _number("LOCAL_WORLD_SIZE", here, least=1)


def device_of_process(device: torch.device) -> torch.device:
    """The device of this process: of a kind of GPU, the one with the number of the process.

    Args:
        device: the one that was asked for.

    Raises:
        InputError: one GPU was named for several processes, or there are fewer GPUs than
            processes.
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
    index = _number("LOCAL_RANK", os.environ.get("LOCAL_RANK", "0"), least=0)
    if device.type == "cuda":
        here = torch.cuda.device_count()
        if index >= here:
            raise InputError(
                f"--device: this machine has {here} GPUs and this is its process number "
                f"{index + 1}; pass --nproc-per-node {here}, or --device cpu"
            )
    return torch.device(device.type, index)


@functools.cache
def meeting() -> Meeting:
    """Meet the other processes of the run, once.

    Raises:
        InputError: the environment does not say where the processes meet, or which one this is.
        ProcessLost: some have not come in time.
    """
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: {', '.join(missing)} not set; "
            f"{_REMEDY} WORLD_SIZE"
        )
    number = _number("RANK", os.environ.get("RANK", ""), least=0, unset="WORLD_SIZE")
    _number("MASTER_PORT", os.environ.get("MASTER_PORT", ""), least=1, unset="WORLD_SIZE")
    if number >= processes():
        raise InputError(
            f"RANK: got {number} where WORLD_SIZE is {processes()}, wanted a smaller number; "
            f"{_REMEDY} WORLD_SIZE"
        )
    # With torch's own timeout: machines may start minutes apart.
    store, rank, size = next(dist.rendezvous("env://"))
    return meet(store, rank, size, _word())


def met() -> Meeting:
    """The `meeting`, or one of this process alone.

    The words of it are lists: how often this machine's torchrun may start its processes again,
    which torchrun that is, and of the process its number and machine.
    """
    return meeting() if launched() else Meeting(dist.HashStore(), 0, 1, (_word(),))


def _word() -> list[Any]:
    most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return [most, launcher(), f"pid {os.getpid()} on {platform.node()}"]


def join(
    device: torch.device,
    timeout: float = 600.0,
    hold: Callable[[], None] = lambda: None,
    sharded: bool = False,
) -> World:
    """Join the other processes of the run, if there are any.

    An existing default process group is used.

    Args:
        device: of this process; decides between gloo and the backend of its kind of device (NCCL).
        timeout: seconds that a process waits for the others before it takes one for lost.
        hold: see `mulki.distributed.world.World`.
        sharded: whether models will be, which torch's own gloo is not safe for.

    Raises:
        InputError, ProcessLost: as `meeting` does.
    """
    global _made
    if dist.is_initialized():
        ours = _made is not None and _made[0] is dist.group.WORLD
        roll = _made[1] if ours and _made is not None else None
        return World(dist.get_rank(), dist.get_world_size(), roll=roll, hold=hold)
    if not launched():
        return World()
    found = meeting()
    backend = dist.get_default_backend_for_device(device)
    bound = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Tensors on the CPU go through gloo, as in torchrun's default.
        backend, bound = f"cpu:gloo,cuda:{backend}", device
    elif sharded and backend == "gloo":
        backend = one_thread_gloo.name()
    rank, size = found.rank, found.size
    store = dist.PrefixStore(f"group {next(_groups)}", found.store)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
        device_id=bound,
    )
    roll = RollCall(store, rank, [place for *_, place in found.words])
    _made = dist.group.WORLD, roll
    return World(rank, size, joined=True, roll=roll, hold=hold)
