"""Which plan is taken: that of least modelled time, or the fastest if that was asked for.

With MULKI_AUTOTUNE=1 the plans of `schedule` are timed for each operator, card and shape (N and P
rounded up to powers of two) at the first use: schedules against each other, and sizes of blocks and
tiles. The fastest is kept in `tiles.json` in the folder MULKI_CACHE_DIR (default ~/.cache/mulki).
Nothing is timed under torch.use_deterministic_algorithms or in a process group, since another plan
rounds differently, while a CUDA graph is captured, or in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import triton

from mulki.files import write_atomic

from . import common, launch, schedule
from .common import Model, next_power_of_2
from .schedule import Problem

Plan = TypeVar("Plan", bound=tuple[Any, ...])  # a NamedTuple
Result = TypeVar("Result")

_chosen: dict[tuple[str, tuple[Any, ...]], int] = {}


def run_plan(
    kind: str,
    problem: Problem,
    models: Sequence[Model],
    function: Callable[[schedule.Plan], Result],
) -> Result:
    """What `function` returns for the plan of a loss."""

    def kept(plan: schedule.Plan) -> list[Any]:
        """The plan without the sizes of this call, for calls whose sizes are like these."""
        of_program = plan.schedule == "rows"
        rows = "all" if plan.rows == problem.n and not of_program else plan.rows
        return [plan.schedule, rows, "all" if plan.columns == problem.p else plan.columns]

    shape = problem.n, problem.p, *problem.widths, *problem[3:]
    return run(kind, models[0], shape, schedule.plans(problem), function, kept)


def run(
    kind: str,
    model: Model,
    shape: Sequence[Any],  # N, P, then what else tells kernels apart
    plans: Sequence[Plan],
    function: Callable[[Plan], Result],
    kept: Callable[[Plan], list[Any]] = list,
) -> Result:
    """What `function` returns for the chosen plan, which is stored as `kept` has it."""
    if launch.is_recording(every_plan=True):
        # Each plan is called, so that the launches of all are recorded.
        results = [function(plan) for plan in plans]
        return results[0]
    device = model.features.device
    if len(plans) == 1 or common.architecture(device) == "interpreter" or not enabled():
        return function(plans[0])
    with launch.current_device(device):
        return function(_fastest(_key(kind, model, shape), plans, function, kept))


def _key(kind: str, model: Model, shape: Sequence[Any]) -> str:
    sizes = "x".join(map(str, (*map(next_power_of_2, shape[:2]), *shape[2:])))
    device, dtype = model.features.device, model.features.dtype
    architecture = common.architecture(device)
    numbers = "half" if dtype != torch.float32 else common.precision(architecture, dtype)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else architecture
    numbers = f"{numbers} {common.number_family(dtype)}"
    return f"{kind} {architecture} {numbers} {sizes} triton {triton.__version__} {card}"


def _fastest(
    key: str,
    plans: Sequence[Plan],
    function: Callable[[Plan], Any],
    kept: Callable[[Plan], list[Any]],
) -> Plan:
    # Sizes of the same key may have other plans: each list is timed once in a process.
    exact = key, tuple(plans)
    if exact in _chosen:
        return plans[_chosen[exact]]
    stored = _read_all().get(key)
    plan = next((plan for plan in plans if kept(plan) == stored), None)
    if plan is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return plans[0]
        plan = min(plans, key=lambda one: milliseconds(lambda: function(one)))
        if stored is None:
            _write(key, kept(plan))
    _chosen[exact] = plans.index(plan)
    return plan


def enabled() -> bool:
    if os.environ.get("MULKI_AUTOTUNE") != "1" or torch.are_deterministic_algorithms_enabled():
        return False
    if dist.is_available() and dist.is_initialized():
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


def _write(key: str, plan: list[Any]) -> None:
    # Two processes may write at the same time. Then a choice may be lost, but no file is broken.
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**_read_all(), key: plan}))
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"MULKI_AUTOTUNE: the choice of tiles could not be kept ({error}) and holds for this "
            f"process; set MULKI_CACHE_DIR to a folder that can be written",
            stacklevel=2,
        )
