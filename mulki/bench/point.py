"""One case: every provider is verified, then timed in turns, then its memory is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from mulki.bench import call_cost
from mulki.bench.cases import Case, Inputs
from mulki.bench.losses import Loss
from mulki.bench.outcomes import outcome
from mulki.bench.providers import PROVIDERS
from mulki.bench.report import REFERENCES, Quantiles, Result, Status
from mulki.bench.verify import Verifier, worst_gradient
from mulki.errors import says_no_memory


class _Checked(NamedTuple):
    """What became of a provider when it was verified at a case."""

    status: Status
    notes: tuple[str, ...] = ()
    call: tuple[Loss, Inputs] | None = None  # if it is right
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
            turns = {
                name: partial(_seconds, case, name, mode, *found.call)
                for name, found in checked.items()
                if found.call is not None
            }
            times = call_cost.take_turns(turns, seconds)
            for name, found in checked.items():
                if found.call is None:
                    results.append(Result(case, name, mode, found.status, found.notes))
                    continue
                metrics = _metrics(case, name, mode, times)
                if mode != "backward" and not PROVIDERS[name].products:
                    context: Callable = partial(PROVIDERS[name].context, case)
                    memory = call_cost.extra_memory(mode, *found.call, case.device, context)
                    metrics |= {key: Quantiles.same(size / 2**20) for key, size in memory.items()}
                if found.error is not None:
                    metrics["gradient_error"] = Quantiles.same(found.error)
                notes, rounds = _notes(case, name, mode), len(times[name])
                results.append(Result(case, name, mode, "timed", notes, rounds, metrics))
    return results


def _check(case: Case, name: str, inputs: Inputs, verifier: Verifier) -> _Checked:
    provider = PROVIDERS[name]
    reason = provider.refusal(case)
    if reason is not None:
        return _Checked("not applicable", (reason,))
    try:
        call = provider.make(case), inputs.without(provider.without)
        if provider.products:
            return _Checked("timed", call=call)
        with provider.context(case):
            errors = verifier.errors(outcome(*call))
    # A provider may be anybody's code: whatever it raises is its result at this case.
    except Exception as error:
        if not says_no_memory(error):
            return _Checked("failed", (f"{type(error).__name__}: {error}".splitlines()[0],))
        found = _Checked("out of memory", (str(error).splitlines()[0],))
    else:
        problems = verifier.problems(errors, provider.strict)
        if problems:
            return _Checked("failed", tuple(problems))
        return _Checked("timed", call=call, error=worst_gradient(errors))
    # Only now, since the exception held on to what the call had allocated: what the allocator
    # keeps is given back, for another provider's pool to take.
    if case.device != "cpu":
        torch.accelerator.empty_cache()
    return found


def _seconds(case: Case, name: str, mode: str, loss: Loss, inputs: Inputs) -> float:
    with PROVIDERS[name].context(case):
        return call_cost.timed(mode, loss, inputs, case.device)


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
