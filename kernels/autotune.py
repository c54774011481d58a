"""Which plan a launch takes: the default of the tile table, or the fastest if that was asked for.

With MULKI_AUTOTUNE=1 the plans of the table are timed for each kernel, card and shape (N and P
rounded up to powers of two) at the first use. The fastest is kept in `tiles.json` in the folder
MULKI_CACHE_DIR (default ~/.cache/mulki). Nothing is timed under
torch.use_deterministic_algorithms, since another tile rounds differently, while a CUDA graph is
captured, or in Triton's interpreter.
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
    shape: Sequence[int],  # N, P, then other sizes that tell kernels apart
    plans: Sequence[Plan],
    function: Callable[[Plan], Result],
) -> Result:
    """What `function` returns for the chosen plan."""
    if launch.is_recording(every_plan=True):
        # Each plan is called, so that the launches of all are recorded.
        results = [function(plan) for plan in plans]
        return results[0]
    if len(plans) == 1 or device.table_architecture == "interpreter" or not enabled():
        return function(plans[0])
    with launch.current_device(device.place):
        return function(_fastest(_key(kind, device, shape), plans, function))


def _key(kind: str, device: Device, shape: Sequence[int]) -> str:
    sizes = "x".join(map(str, (*map(next_power_of_2, shape[:2]), *shape[2:])))
    number_format = "half" if device.half else device.precision
    on_gpu = device.place is not None and device.place.type == "cuda"
    card = torch.cuda.get_device_name(device.place) if on_gpu else device.architecture
    return (
        f"{kind} {device.architecture} {number_format} {sizes} triton {triton.__version__} {card}"
    )


def _fastest(key: str, plans: Sequence[Plan], function: Callable[[Plan], Any]) -> Plan:
    # The number of splits follows from the exact shape, so schedule and tile are kept without it.
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
    """The median time of a call; infinite where the kernel needs more than the GPU has."""
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
    # RuntimeError: there is no home directory.
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
    # Two processes may write at the same time. Then a choice may be lost, but no file is broken.
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
