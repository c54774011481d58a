"""Operators and losses over random shapes, memory layouts, dtypes, masks, scales and threads.

By the C++ kernels, or what else serves CPU tensors here, and by the reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from mulki.ops import backends, use_backend
from tests.ops.op_cases import NAMES, Case, make
from tests.ops.rounding import EPS, compared, error, magnitudes, ours, rounded_products

SLACK = 3.0  # one order of summation against another, also where sums nearly cancel


class Drawn(NamedTuple):
    """The arguments of `make`, and how the operator is called."""

    name: str
    n: int
    p: int
    d: int
    dtype: torch.dtype
    scale: float
    gap: float | None
    seed: int
    layouts: tuple[str, str]
    threads: int
    mean: bool | None
    backend: str | None  # None: the one that serves it


def _rows_apart(t: Tensor) -> Tensor:
    apart = torch.full((t.shape[0], t.shape[1] + 3), torch.nan, dtype=t.dtype)
    apart[:, 1:-2] = t
    return apart[:, 1:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "rows apart": _rows_apart,
    "backwards": lambda t: t.flip(0).contiguous().flip(0),
    "not aligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}
_SIZES = st.integers(1, 40) | st.sampled_from([64, 65, 100, 129, 257])


def cases(
    sizes: st.SearchStrategy[int] = _SIZES,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    served_by: Sequence[str | None] = (None, None, "reference"),
) -> st.SearchStrategy[Drawn]:
    """Cases of all operators, with rows that are empty now and then."""
    return st.builds(
        Drawn,
        name=st.sampled_from(NAMES),
        n=st.integers(0, 3) | sizes,
        p=sizes,
        d=sizes,
        dtype=st.sampled_from(dtypes),
        scale=st.sampled_from([0.0, 1e-3, 1.0, 14.3, 100.0, -9.0, 1e3, 1e4]),
        gap=st.sampled_from([None, 0.0, 1e-3, 0.1]),
        seed=st.integers(0, 2**16),
        layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
        threads=st.integers(1, 3),
        mean=st.sampled_from([None, False, True]),
        backend=st.sampled_from(served_by),
    )


def case_of(drawn: Drawn) -> Case:
    """The operator's case with its operands in the drawn layouts."""
    case = make(*drawn[:8])
    x, w, *rest = case.args
    of_x, of_w = (LAYOUTS[layout] for layout in drawn.layouts)
    return Case(case.op, (of_x(x), of_w(w), *rest))


def is_right(drawn: Drawn) -> None:
    """Loss and gradients agree with float64, repeat bit for bit, and change no argument."""
    forced = use_backend(drawn.backend) if drawn.backend else contextlib.nullcontext()
    with forced:
        _check(drawn, case_of(drawn))


def _check(drawn: Drawn, case: Case) -> None:
    # A similarity has no sum.
    mean = None if case.op == "similarity" else drawn.mean
    before = [_copy(argument) for argument in case.args]
    threads = torch.get_num_threads()
    served = drawn.backend or backends.choose(case.op, "cpu", drawn.dtype).backend
    # torch splits sums over its threads, and multiplies for all backends but the C++ kernels; for
    # these the gradients of a similarity in half precision.
    by_torch = served != "cpp" or (case.op == "similarity" and drawn.dtype != torch.float32)
    try:
        torch.set_num_threads(drawn.threads)
        results = ours(case, mean)
        torch.set_num_threads(drawn.threads if by_torch else 1)
        again = ours(case, mean)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(before, case.args, strict=True):
        assert _same(one, other), "an argument has changed"
    for one, other in zip(results, again, strict=True):
        assert _same(one, other), "a repetition, or another number of threads, gives other bits"
    if case.args[0].shape[0] == 0:
        return
    for i, (got, want, bound) in enumerate(allowed(case, mean)):
        # float16 has no numbers beyond 65504.
        within = want.abs() < torch.finfo(got.dtype).max / 2
        assert got.isfinite()[within].all(), f"result {i} is not finite"
        # Beyond, the rounding of a logit is as large as what is compared.
        if within.all() and abs(drawn.scale) <= 100:
            off = error(got, want)
            if i == 0 and case.op != "similarity":
                # A loss is a difference of logarithms: their own rounding is always allowed.
                bound = max(bound, 4 * EPS)
            assert off <= bound, f"result {i}: error {off:.3g}, allowed {bound:.3g}"


def allowed(case: Case, mean: bool | None) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Loss and gradients by the operator, the truth, and how far they may be apart.

    Narrow enough to see a gradient that is wrong by a few percent in half precision.
    """
    half = case.args[0].dtype != torch.float32
    sizes = magnitudes(case, mean, 1 + case.leaves)
    products = [0.0] * (1 + case.leaves)
    if half and case.op != "similarity":
        products[1:] = rounded_products(case, mean)
    for i, (got, wide, want, of_tests) in enumerate(compared(case, mean)):
        if half and case.op == "similarity":
            # Its G is given, and rows may be rounded when they are normalised.
            yield got, want, 2 * of_tests
            continue
        own = torch.finfo(got.dtype).eps / 2 * want.norm().item()
        underflow = torch.finfo(got.dtype).tiny * got.numel() ** 0.5
        bound = SLACK * error(wide, want) + EPS * sizes[i] + 1.5 * products[i] + own + underflow
        yield got, want, bound


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return all(map(_same, one, other))
    if not isinstance(one, Tensor):
        return bool(one == other)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.equal(*(t.contiguous().view(bits[t.element_size()]) for t in (one, other)))


tries = {is_right: cases()}
