"""Direct calls of `torch.ops.mulki` with one argument that is wrong, extreme or not finite.

Whatever it is, the backend that serves the call and the reference in float64 either both refuse it,
by an error that is meant for people, or both return. Wherever the reference is finite then, all
results agree as far as float32 can: rounding of logits is allowed for, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from mulki.ops import use_backend
from tests.ops.op_cases import LOSSES, NAMES, Case, asking, doubled, make, run, with_argument

BATCH = 200

NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e-3, 1e3, 1e9, 1e30, 3e38, -3e38)
EXTREMES = (*NUMBERS, math.inf, -math.inf, math.nan)
WHOLE = (-(2**63), -(2**31), -100, -1, 0, 1, 3, 2**31, 2**63 - 1)
# Errors that name what is wrong, or that torch raises for an argument of another type.
MEANT = (TypeError, ValueError, RuntimeError)
# Relative errors of results: of a few hundred roundings of float32, and of one of half precision.
FLOAT, HALF = 3e-5, 2e-2
LARGEST = 0.05  # rounding of a logit, beyond which a result says nothing any more


class Drawn(NamedTuple):
    """A call, and what is changed in it."""

    name: str
    n: int
    p: int
    d: int
    dtype: torch.dtype
    scale: float
    place: int  # of the argument, modulo their number
    change: str
    number: float
    whole: int
    at: int  # of the entry, modulo their number
    form: str
    mean: bool
    seed: int


def _entry(value: Tensor, drawn: Drawn) -> Tensor:
    flat = value.clone().flatten()
    if flat.numel():
        flat[drawn.at % flat.numel()] = _number(value, drawn)
    return flat.view(value.shape)


def _row(value: Tensor, drawn: Drawn) -> Tensor:
    changed = value.clone()
    if value.ndim and len(value):
        changed[drawn.at % len(value)] = _number(value, drawn)
    return changed


def _number(value: Tensor, drawn: Drawn) -> float | bool:
    if value.dtype == torch.bool:
        return bool(drawn.whole % 2)
    if not value.is_floating_point():
        return drawn.whole
    fits = abs(drawn.number) <= torch.finfo(value.dtype).max
    return drawn.number if fits else math.copysign(math.inf, drawn.number)


CHANGES: dict[str, Callable[[Tensor, Drawn], Any]] = {
    "entry": _entry,
    "row": _row,
    "all": lambda t, drawn: torch.full_like(t, _number(t, drawn)),
    "times": lambda t, drawn: t * drawn.number if t.is_floating_point() else t,
    "none": lambda t, drawn: None,
    "longer": lambda t, drawn: torch.cat([t, t]) if t.ndim else t[None],
    "shorter": lambda t, drawn: t[1:] if t.ndim else t,
    "turned": lambda t, drawn: t.mT if t.ndim > 1 else t,
    "expanded": lambda t, drawn: t[:1].expand_as(t) if t.ndim and len(t) else t,
    "strided": lambda t, drawn: torch.stack([t, t], -1)[..., 0],
    "empty": lambda t, drawn: t.new_empty(0),
    "deeper": lambda t, drawn: t[None],
    "half": lambda t, drawn: t.half(),
    "wide": lambda t, drawn: t.double(),
    "whole": lambda t, drawn: t.long(),
    "short": lambda t, drawn: t.int(),
    "flags": lambda t, drawn: t > 0,
}


def changed(drawn: Drawn) -> Case:
    """The call; where a list of tensors is changed, it is one of them, or their number."""
    case = make(drawn.name, drawn.n, drawn.p, drawn.d, drawn.dtype, drawn.scale, seed=drawn.seed)
    place = drawn.place % len(case.args)
    value = case.args[place]
    if isinstance(value, list):
        index, copy = drawn.at % (len(value) + 1), list(value)
        if index == len(value):
            copy = [*value, value[0]] if drawn.whole % 2 else value[1:]
        else:
            copy[index] = CHANGES[drawn.change](value[index], drawn)
        return with_argument(case, place, copy)
    if isinstance(value, Tensor):
        return with_argument(case, place, CHANGES[drawn.change](value, drawn))
    if isinstance(value, bool):
        return with_argument(case, place, not value)
    if isinstance(value, float):
        return with_argument(case, place, drawn.number)
    return with_argument(case, place, drawn.whole if isinstance(value, int) else value)


def is_right(drawn: Drawn) -> None:
    """Both refuse, or both return the same."""
    plain = changed(drawn)
    form = drawn.form if drawn.name in LOSSES or drawn.form != "reduced" else "rows"
    try:
        case = asking(plain, form, mean=drawn.mean)
    except (IndexError, AttributeError):
        return  # an upstream gradient has no shape
    got, refused = _outcome(case, None)
    wide = Case(case.op, tuple(doubled(a) for a in case.args))
    want, refused_wide = _outcome(wide, "reference")
    # Values are read in the forward pass. After it, a kernel may refuse what the reference takes.
    if (refused or refused_wide) and form != "backward":
        _, alike = _outcome(case, "reference")
        assert bool(refused) == bool(alike), f"{refused!r} and {alike!r}"
    if got is None or want is None:
        return
    allowed = _allowed(plain, drawn)
    for i, (ours, truth) in enumerate(zip(got, want, strict=True)):
        assert ours.shape == truth.shape, f"result {i} has the shape {list(ours.shape)}"
        off = None if allowed is None else _beyond(ours, truth, allowed)
        assert off is None, f"result {i}: {off}"


def _outcome(case: Case, backend: str | None) -> tuple[tuple[Tensor, ...] | None, str]:
    try:
        if backend is None:
            return run(case), ""
        with use_backend(backend):
            return run(case), ""
    except MEANT as error:
        assert "INTERNAL ASSERT" not in str(error), error
        return None, f"{type(error).__name__}: {error}"


def _allowed(case: Case, drawn: Drawn) -> float | None:
    # How far results may be from the truth, relative to them and to 1; None where rounding may do
    # anything, or where an argument is not finite.
    numbers = [abs(float(a)) for a in case.args if isinstance(a, float)]
    tensors = [t for a in case.args for t in (a if isinstance(a, list) else [a])]
    floats = [t.double() for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    large = [float(t.abs().max()) if t.numel() else 0.0 for t in floats]
    if not all(map(math.isfinite, (*numbers, *large))):
        return None
    scale = max([1.0, *(size for t, size in zip(floats, large, strict=True) if t.ndim < 2)])
    norm = max([1.0, *(float(t.square().sum(1).max()) for t in floats if t.ndim == 2 and len(t))])
    logit = scale * norm / min([1.0, *(number for number in numbers if number > 0)])
    # Logits, times numbers that are given, summed over rows and models.
    size = (1 + logit) * max([1.0, *large]) ** 2 * (1 + drawn.n) * (1 + len(floats))
    size *= math.prod(max(1.0, number) ** 2 for number in numbers)
    relative = FLOAT if drawn.dtype == torch.float32 else HALF
    return None if logit * FLOAT > LARGEST or size * relative > 1e3 else relative * size


def _beyond(got: Tensor, want: Tensor, relative: float) -> str | None:
    # Where a result is further from the truth than that; None where it is not.
    finite = want.isfinite() & (want.abs() < 1e4)
    bad = finite & ~((got.double() - want).abs() <= relative * (1 + want.abs()))
    if not bad.any():
        return None
    at = tuple(bad.nonzero()[0].tolist())
    return f"{got[at].item():.9g} at {at}, {want[at].item():.9g} was right"


CASES = st.builds(
    Drawn,
    name=st.sampled_from(NAMES),
    n=st.integers(0, 9),
    p=st.integers(1, 20),
    d=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 14.3, 100.0, -9.0, 0.0]),
    place=st.integers(0, 15),
    change=st.sampled_from(list(CHANGES)),
    number=st.sampled_from(EXTREMES),
    whole=st.sampled_from(WHOLE),
    at=st.integers(0, 60),
    form=st.sampled_from(["rows", "backward", "reduced"]),
    mean=st.booleans(),
    seed=st.integers(0, 2**16),
)
tries = {is_right: CASES}
