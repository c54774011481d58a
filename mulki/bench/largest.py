"""The largest N whose forward and backward pass fits the memory of a GPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from mulki.bench import call_cost
from mulki.bench.cases import PAIRED, WIDTH, Case
from mulki.bench.point import free_memory
from mulki.bench.providers import PROVIDERS, Provider
from mulki.bench.report import Quantiles, Result
from mulki.errors import says_no_memory

PROTOTYPES = 8192  # P of an operator that is not on pairs
START = 1024
#: Where the search ends, whatever would fit; a call on pairs takes a time of N squared.
LIMIT, PAIRED_LIMIT = 1 << 20, 1 << 18
_STEPS = 3  # of bisection, which leave an eighth in doubt
_SLOW = 10.0  # seconds of a call beyond which no larger N is tried


class Found(NamedTuple):
    """How a search ended."""

    n: int  # the largest that was seen to fit, 0 for none
    why: str  # the search went no further


def cases(operators: Sequence[str], dtypes: Sequence[str], device: str) -> list[Case]:
    """What is searched: the operators at P and D, N the start of the search."""
    return [
        Case(name, START, START if name in PAIRED else PROTOTYPES, WIDTH, dtype, device)
        for name in operators
        for dtype in dtypes
    ]


def search(case: Case, providers: Sequence[str], limit: int = 0) -> list[Result]:
    """A result per provider.

    Args:
        limit: a power of two, the last N that is tried; 0 for LIMIT or PAIRED_LIMIT.
    """
    limit = limit or (PAIRED_LIMIT if case.operator in PAIRED else LIMIT)
    return [_search(case, PROVIDERS[name], limit) for name in providers]


def _search(case: Case, provider: Provider, limit: int) -> Result:
    result = functools.partial(Result, case, provider.name, "both", metric="largest_n")
    reason = provider.refusal(case)
    if reason is None and provider.graphed:
        reason = "needs what the calls it captures need"
    if reason is None and provider.products:
        reason = "computes no loss"
    if reason is not None:
        return result("not applicable", (reason,))
    try:
        found = largest(lambda n: _seconds(with_samples(case, n), provider), START, limit)
    # A provider may be anybody's code: whatever it raises is its result.
    except Exception as error:
        notes = (f"{type(error).__name__}: {error}".splitlines()[0],)
        return result("failed", notes)
    finally:
        free_memory(case.device)
    if found.n == 0:
        return result("out of memory", (f"N = {START}",))
    metrics = {"largest_n": Quantiles.same(found.n)}
    notes = (f"N = {found.n}, {found.why}",)
    found_case = with_samples(case, found.n)
    return Result(found_case, provider.name, "both", "searched", notes, 1, metrics)


def largest(seconds: Callable[[int], float | None], start: int, limit: int) -> Found:
    """Double N until it does not fit, then halve the doubt some times.

    Args:
        seconds: what a call on N samples took, or None if it does not fit.
        start, limit: powers of two, the first N and the last.
    """
    low, high = 0, start
    while high <= limit:
        took = seconds(high)
        if took is None:
            break
        low, high = high, 2 * high
        if took > _SLOW:
            return Found(low, f"where a call took {took:.0f} s")
    else:
        return Found(low, "where the search ends")
    if low == 0:
        return Found(0, "which does not fit")
    for _ in range(_STEPS):
        middle = (low + high) // 2
        low, high = (low, middle) if seconds(middle) is None else (middle, high)
    return Found(low, f"and {high} does not fit")


def with_samples(case: Case, n: int) -> Case:
    """The case with other N."""
    return replace(case, n=n, p=n if case.operator in PAIRED else case.p)


def _seconds(case: Case, provider: Provider) -> float | None:
    free_memory(case.device)
    try:
        inputs = case.inputs().without(provider.without)
        loss = provider.make(case)

        def timed() -> float:
            start = time.perf_counter()
            with provider.context(case):
                outputs = call_cost.outputs("both", loss, inputs)
                float(outputs[0].sum())  # waits for it
            return time.perf_counter() - start

        first = timed()
        # A first call may have compiled.
        return first if first <= _SLOW else timed()
    except Exception as error:
        if says_no_memory(error):
            return None
        raise
