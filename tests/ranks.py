"""Run a function on several ranks of a gloo process group, each a process of its own."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mulki.distributed import one_thread_gloo

# Beyond this a collective that some rank never joins is an error. Far above what a test needs.
TIMEOUT_S = 300


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, sharded: bool = False
) -> list[Any]:
    """What `function(rank, world, *args)` returns on each rank; the first exception is raised.

    `sharded`: models will be, see `mulki.distributed.one_thread_gloo`.
    `function` is one of a module's, for it is pickled. The processes are forked from a server that
    has imported torch and mulki, so a call takes a fraction of a second.
    """
    context = multiprocessing.get_context("forkserver")
    # What functions of tests import. `mulki` alone imports nothing.
    needed = "pytest torch.distributed.tensor open_clip mulki.losses mulki.train.model".split()
    context.set_forkserver_preload(needed)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        with ProcessPoolExecutor(world, mp_context=context) as pool:
            futures = [
                pool.submit(_run, rank, world, str(store), sharded, function, args)
                for rank in range(world)
            ]
            return [future.result() for future in futures]


def _run(
    rank: int,
    world: int,
    store: str,
    sharded: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        one_thread_gloo.name() if sharded else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    try:
        return function(rank, world, *args)
    finally:
        dist.destroy_process_group()
