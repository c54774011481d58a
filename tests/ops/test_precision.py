"""Rounding of every operator, as `rounding.py` measures it: shapes, dtypes, layouts, scales."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.op_cases import LOSSES, NAMES, Case, asking, expected, make, run
from tests.ops.rounding import DTYPES, check, error, ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "mean"), [*product(NAMES, [None]), *product(LOSSES, [True, False])]
)
def test_every_operator(name, mean, dtype, backend):
    check(make(name, n=37, p=53, d=64, dtype=dtype, scale=30.0), mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_which_products_round_the_gradient_of_logits(dtype, backend):
    """As docs/numerics.md says: those of bfloat16 in C++ alone, where the CPU has them."""
    case = make("ce", 64, 50, 96, dtype, scale=14.3)
    truth = expected(case, False)[1]
    made = run(asking(case, "reduced", [True] * 3, mean=False))[-3:]
    may_round = backend == "cpp" and dtype == torch.bfloat16
    for got, want in zip(made[:2], truth[:2], strict=True):
        assert got.dtype == torch.float32
        off = error(got, want) / want.norm().item()
        assert off < (3e-3 if may_round else 1e-6)


@pytest.mark.parametrize("height", [1.0, 3.0])
@pytest.mark.parametrize("name", ["ce", "kl", "pairs", "contrastive", "siglip"])
def test_features_with_one_large_dimension(name, height, backend):
    """As CLIP's have: what scales a row by its largest element has fewer digits for the others."""
    case = make(name, n=64, p=130, d=512, dtype=torch.float32, scale=50.0, gap=0.1)

    def peaked(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[:, 3] = height
        return F.normalize(rows, dim=1)

    check(case._replace(args=(*(peaked(a) for a in case.args[:2]), *case.args[2:])), True)


@pytest.mark.parametrize(("name", "p"), [("ce", 255), ("ce", 5000), ("contrastive", 256)])
def test_gradients_of_logits_that_say_little(name, p, backend):
    """Of a row the match has one half of the gradient, and all others have the other half."""
    check(make(name, n=256, p=p, d=128, dtype=torch.float32, scale=1.0), True)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    # Only the C++ kernels have more ways than one, by D.
    ("backend", "d"),
    [("reference", 96), ("chunked", 96), ("cpp", 24), ("cpp", 96)],
    indirect=["backend"],
)
def test_scales(name, d, backend):
    for scale in (1e-4, 0.0, -20.0, 1e3, 1e4):
        for dtype in DTYPES:
            case = make(name, n=13, p=29, d=d, dtype=dtype, scale=scale)
            if dtype != torch.float16 or abs(scale) < 1e4:
                check(case, True)
            for out in (*ours(case, None)[:1], *ours(case, True)):
                assert out.isfinite().all()


@pytest.mark.parametrize(
    ("n", "p", "d"),
    [
        *((1, 1, 1), (1, 7, 3), (7, 1, 64), (64, 100, 17), (130, 257, 33), (5, 1000, 8)),
        *((1, 1, 64), (64, 65, 127), (130, 257, 100), (5, 1000, 65), (9, 31, 2048)),
    ],
)
def test_ragged_shapes(n, p, d, backend):
    if backend != "cpp" and (n, p, d) not in ((1, 7, 3), (64, 100, 17), (9, 31, 2048)):
        pytest.skip("one block, which tests/ops/chunked cut")
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            case = make(name, n=n, p=p, d=d, dtype=dtype, scale=20.0)
            check(case, True if name in LOSSES else None)
            if name in LOSSES:
                check(case, None)


LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values (but for expanded ones) with other strides."""
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "sliced":
        odd = math.nan if t.is_floating_point() else -7
        wide = t.new_full([2 * size + 1 for size in t.shape], odd)
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t


def with_layout(case: Case, layout: str) -> Case:
    args = []
    for value in case.args:
        if isinstance(value, list):
            value = [laid_out(v, layout) if v.ndim else v for v in value]
        elif isinstance(value, Tensor) and value.ndim > 0:
            numbers = value.ndim == 1 and layout in ("transposed", "expanded")
            value = value if numbers else laid_out(value, layout)
        args.append(value)
    return Case(case.op, tuple(args))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name, layout, backend):
    for dtype in (torch.float32, torch.bfloat16):
        case = with_layout(make(name, n=11, p=19, d=12, dtype=dtype), layout)
        dense = Case(case.op, tuple(_dense(a) for a in case.args))
        wanted = [True] * case.leaves
        for form in ("rows", "backward", "reduced"):
            if form == "reduced" and name not in LOSSES:
                continue
            strided, plain = case, dense
            if form != "rows":
                strided, plain = (asking(c, form, wanted) for c in (case, dense))
            if form == "backward":
                grad = laid_out(strided.args[0], "sliced")
                strided = Case(strided.op, (grad, *strided.args[1:]))
            for a, b in zip(run(strided), run(plain), strict=True):
                # A BLAS may add in another order where strides are others.
                atol = 1e-6 if backend == "cpp" else 5e-6
                torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=atol)


def _dense(value: object) -> object:
    if isinstance(value, list):
        return [_dense(v) for v in value]
    return (
        value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
    )


@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [(131, 33, torch.float32), (300, 300, torch.float32), (1100, 66, torch.bfloat16)],
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_results_repeat_bit_for_bit_whatever_the_number_of_threads(name, n, d, dtype, backend):
    case = make(name, n=n, p=67, d=d, dtype=dtype)
    wanted = [True] * case.leaves
    cases = [case, asking(case, "backward", wanted)]
    if name in LOSSES:
        cases.append(asking(case, "reduced", wanted))
    threads = torch.get_num_threads()
    results = []
    try:
        # Matrix products of PyTorch do not promise that. The other backends are made of them, and
        # so are gradients of the similarity in bfloat16.
        plain = (name, dtype) == ("similarity", torch.bfloat16)
        for number in (1, 1) if plain else (1, 2, 9, 2):
            torch.set_num_threads(number)
            results.append([out for c in cases for out in run(c)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(NAMES),
    n=st.integers(1, 40),
    p=st.integers(1, 70),
    d=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    scale=st.floats(-100, 100, width=32),
    seed=st.integers(0, 5),
    mean=st.sampled_from([None, True, False]),
)
def test_any_shape_dtype_and_layout(backend, name, n, p, d, dtype, layout, scale, seed, mean):
    case = make(name, n=n, p=p, d=d, dtype=dtype, scale=scale, seed=seed)
    check(with_layout(case, layout), mean if name in LOSSES else None)
