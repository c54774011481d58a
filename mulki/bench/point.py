"""One case: every provider is verified, then timed in turns, then its memory is measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mulki.bench import call_cost, clocks
from mulki.bench.calls import Calls, calls_of
from mulki.bench.cases import Case, Inputs
from mulki.bench.providers import PROVIDERS
from mulki.bench.report import REFERENCES, Quantiles, Result, Status
from mulki.bench.verify import Verifier, worst_gradient
from mulki.errors import says_no_memory


@dataclass(frozen=True)
class _Checked:
    """What became of a provider when it was verified at a case."""

    status: Status
    notes: tuple[str, ...] = ()
    calls: Calls | None = None  # if it is right
    error: float | None = None  # of its worst gradient, if it has gradients


def measure_case(
    case: Case, providers: Sequence[str], modes: Sequence[str], seconds: float
) -> list[Result]:
    """Verify every provider at a case, and time those that are right, turn by turn.

    Args:
        seconds: how long a provider is timed in a mode.

    Returns:
        A result per mode and provider.
    """
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    checked = {name: _check(case, name, inputs, verifier) for name in providers}
    del verifier
    results = []
    with call_cost.no_garbage_collection():
        for mode in modes:
            right = {
                name: found.calls
                for name, found in checked.items()
                if found.calls is not None and mode in found.calls.modes
            }
            times = _times(right, mode, seconds, ahead=False)
            alone: dict[str, list[float]] = {}
            if clocks.has_events(case.device):
                alone = _times(right, mode, seconds / 2, ahead=True)
            for name, found in checked.items():
                if name not in right:
                    status = "not applicable" if found.calls is not None else found.status
                    notes = found.notes or (f"has no {mode} pass of its own",)
                    results.append(Result(case, name, mode, status, notes))
                    continue
                metrics = _metrics(case, name, mode, times)
                notes = _notes(case, name, mode)
                device = [1e3 * t for t in alone.get(name, ()) if not math.isnan(t)]
                if device:
                    metrics["device_time"] = Quantiles.of(device)
                elif name in alone:
                    notes += ("waits for the device, which cannot be timed alone",)
                if mode != "backward":
                    memory = right[name].memory(mode)
                    metrics |= {key: Quantiles.same(size / 2**20) for key, size in memory.items()}
                if found.error is not None:
                    metrics["gradient_error"] = Quantiles.same(found.error)
                rounds = len(times[name])
                results.append(Result(case, name, mode, "timed", notes, rounds, metrics))
    return results


def _check(case: Case, name: str, inputs: Inputs, verifier: Verifier) -> _Checked:
    provider = PROVIDERS[name]
    reason = provider.refusal(case)
    if reason is not None:
        return _Checked("not applicable", (reason,))
    try:
        calls = calls_of(provider, case, inputs)
        errors = verifier.errors(calls.outcome())
    # A provider may be anybody's code: whatever it raises is its result at this case.
    except Exception as error:
        if not says_no_memory(error):
            return _Checked("failed", (f"{type(error).__name__}: {error}".splitlines()[0],))
        found = _Checked("out of memory", (str(error).splitlines()[0],))
    else:
        problems = verifier.problems(errors, provider.strict)
        if problems:
            return _Checked("failed", tuple(problems))
        return _Checked("timed", calls=calls, error=worst_gradient(errors))
    # Only now, since the exception held on to what the call had allocated.
    free_memory(case.device)
    return found


def free_memory(device: str) -> None:
    """Give back what the allocator keeps, for another provider's pool to take."""
    if device != "cpu":
        torch.accelerator.empty_cache()


def _times(
    calls: dict[str, Calls], mode: str, seconds: float, ahead: bool
) -> dict[str, list[float]]:
    turns = {name: functools.partial(of.seconds, mode, ahead) for name, of in calls.items()}
    return call_cost.take_turns(turns, seconds)


def _metrics(
    case: Case, name: str, mode: str, times: dict[str, list[float]]
) -> dict[str, Quantiles]:
    own = times[name]
    metrics = {"speed": Quantiles.of([1e3 * t for t in own])}
    if _only_scales(case, name, mode):
        return metrics
    for other in REFERENCES:
        if other in times and other != name:
            ratios = [a / b for a, b in zip(times[other], own, strict=True)]
            metrics[f"speedup_over_{other}"] = Quantiles.of(ratios)
    metrics["throughput"] = Quantiles.of([case.operations(mode) / t / 1e9 for t in own])
    return metrics


def _only_scales(case: Case, name: str, mode: str) -> bool:
    is_loss = case.operator != "similarity"
    return mode == "backward" and is_loss and PROVIDERS[name].early_gradients


def _notes(case: Case, name: str, mode: str) -> tuple[str, ...]:
    early = "forms gradients in the forward pass, so that backward alone only scales them"
    notes = PROVIDERS[name].note(case), early if _only_scales(case, name, mode) else ""
    return tuple(filter(None, notes))
