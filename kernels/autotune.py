"""The plan a launch takes: the table's default, or the fastest one where that was asked for.

MULKI_AUTOTUNE=1 times the plans of the table for each kernel, card and shape (N and P rounded up to
powers of two) at its first use, and keeps the choice in `tiles.json` in MULKI_CACHE_DIR (by default
~/.cache/mulki). It is off under torch.use_deterministic_algorithms, since a different tile rounds
differently, while a CUDA graph is captured, and in the interpreter, which has no clock.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

from mulki.files import write_atomic

from . import launch
from .common import next_power_of_2
from .tiles import Device, Plan, Tile

Result = TypeVar("Result")

_chosen: dict[str, tuple[str, Tile]] = {}


def run(
    kind: str,
    device: Device,
    shape: Sequence[int],  # N, P and what else a kernel is compiled for
    plans: Sequence[Plan],
    function: Callable[[Plan], Result],
) -> Result:
    """`function` of one of the plans."""
    if launch.is_recording(every_plan=True):
        return [function(plan) for plan in plans][0]
    if len(plans) == 1 or device.known == "interpreter" or not enabled():
        return function(plans[0])
    with launch.on(device.place):
        return function(_fastest(_key(kind, device, shape), plans, function))


def _key(kind: str, device: Device, shape: Sequence[int]) -> str:
    sizes = "x".join(map(str, (*map(next_power_of_2, shape[:2]), *shape[2:])))
    numbers = "half" if device.half else device.precision
    on_gpu = device.place is not None and device.place.type == "cuda"
    card = torch.cuda.get_device_name(device.place) if on_gpu else device.architecture
    return f"{kind} {device.architecture} {numbers} {sizes} triton {triton.__version__} {card}"


def _fastest(key: str, plans: Sequence[Plan], function: Callable[[Plan], Any]) -> Plan:
    # Splits follow from the exact shape, so a choice is one of schedule and tile.
    choice = _chosen.get(key) or _read(key)
    plan = next((plan for plan in plans if (plan.schedule, plan.tile) == choice), None)
    if plan is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return plans[0]
        plan = min(plans, key=lambda one: milliseconds(lambda: function(one)))
        _write(key, plan)
    _chosen[key] = (plan.schedule, plan.tile)
    return plan


def enabled() -> bool:
    if os.environ.get("MULKI_AUTOTUNE") != "1" or torch.are_deterministic_algorithms_enabled():
        return False
    return not launch.is_recording()


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
    # RuntimeError: there is no home.
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(key: str) -> tuple[str, Tile] | None:
    try:
        schedule, tile = _read_all()[key]
        return schedule, Tile(*tile)
    except (KeyError, TypeError, ValueError):
        return None


def _write(key: str, plan: Plan) -> None:
    # Another process may write at the same time: it may lose an entry, but reads a whole file.
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**_read_all(), key: [plan.schedule, list(plan.tile)]}))
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"MULKI_AUTOTUNE: the choice of tiles could not be kept ({error}) and holds for this "
            f"process; set MULKI_CACHE_DIR to a folder that can be written",
            stacklevel=2,
        )
