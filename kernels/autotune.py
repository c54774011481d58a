"""The plan a launch takes: the table's default, or the fastest one where that was asked for.

MULKI_AUTOTUNE=1 times the plans of the table for each kernel and shape (sizes rounded up to powers
of two) at its first use, and keeps the choice in `tiles.json` in MULKI_CACHE_DIR (by default
~/.cache/mulki). It is off under torch.use_deterministic_algorithms, since a different tile rounds
differently, and while a CUDA graph is captured.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from . import launch
from .tiles import Device, Plan, Tile

Result = TypeVar("Result")

_chosen: dict[str, tuple[str, Tile]] = {}


def run(
    kind: str,
    device: Device,
    shape: Sequence[int],
    plans: Sequence[Plan],
    function: Callable[[Plan], Result],
) -> Result:
    """`function` of one of the plans."""
    if launch.is_recording(every_plan=True):
        return [function(plan) for plan in plans][0]
    if len(plans) == 1 or not enabled():
        return function(plans[0])
    sizes = "x".join(str(triton.next_power_of_2(size)) for size in shape)
    key = f"{kind} {device.architecture} {device.family} {sizes} triton {triton.__version__}"
    # Splits follow from the exact shape, so a choice is one of schedule and tile.
    choice = _chosen.get(key) or _read(key)
    plan = next((plan for plan in plans if (plan.schedule, plan.tile) == choice), None)
    if plan is None:
        plan = min(plans, key=lambda one: milliseconds(lambda: function(one)))
        _write(key, plan)
    _chosen[key] = (plan.schedule, plan.tile)
    return function(plan)


def enabled() -> bool:
    if os.environ.get("MULKI_AUTOTUNE") != "1" or torch.are_deterministic_algorithms_enabled():
        return False
    if launch.is_recording():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def milliseconds(function: Callable[[], object]) -> float:
    """The time of a call; infinite where the GPU has not the resources for it."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        return float(do_bench(function, return_mode="median"))
    except (OutOfResources, PTXASError):
        return float("inf")


def cache_file() -> Path:
    folder = os.environ.get("MULKI_CACHE_DIR", "")
    return (Path(folder) if folder else Path.home() / ".cache" / "mulki") / "tiles.json"


def _read_all() -> dict[str, Any]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(key: str) -> tuple[str, Tile] | None:
    try:
        schedule, tile = _read_all()[key]
        return schedule, Tile(*tile)
    except (KeyError, TypeError, ValueError):
        return None


def _write(key: str, plan: Plan) -> None:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may write at the same time: it may lose an entry, but reads a whole file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({**_read_all(), key: [plan.schedule, list(plan.tile)]}, file)
    os.replace(file.name, path)
