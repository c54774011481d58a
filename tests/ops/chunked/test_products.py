"""Products of half precision: as they are where torch has them, and cast elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mulki.ops import use_backend
from mulki.ops.chunked import products
from mulki.ops.chunked.products import Products
from mulki.ops.operators import OPERATORS
from tests.ops.chunked.cut import same_as_the_reference
from tests.ops.chunked.watch import MIB
from tests.ops.op_cases import NAMES, Case, asking, make, run, with_argument


def test_the_cpu_casts_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(products, "multiplies_halves", lambda *_: False)
    monkeypatch.setenv("MULKI_CHUNK_MB", str(4 * 20 * 8 / MIB))
    x, w = (torch.randn(n, 5).bfloat16() for n in (3, 11))
    model, out = Products(x, w), torch.empty(3, 11)
    assert [len(part) for _, part in model._parts(w)] == [4, 4, 3]
    model.logits(slice(0, 3), slice(0, 11), out)
    torch.testing.assert_close(out, x.float() @ w.float().T)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Half precision is multiplied as on a GPU, by products that are cast here."""
    seen = set()

    def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        seen.add(a.dtype)
        assert a.dtype == b.dtype and out.dtype == torch.float32
        product = a.float() @ b.float()
        if add:
            out.add_(product)
        else:
            out.copy_(product)

    monkeypatch.setattr(products, "_multiply", multiply)
    monkeypatch.setattr(products, "multiplies_halves", lambda *_: True)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_g_is_rounded_where_halves_are_multiplied(name, dtype, halves, cut_small):
    same_as_the_reference(name, (dtype,))
    assert halves == {dtype}


@pytest.mark.parametrize("side", [0, 1])
def test_float16_keeps_gradients_beside_a_row_of_zeros(side, halves):
    case = make("cosines", n=9, p=11, d=7, dtype=torch.float16)
    case.args[side][2] = 0
    case = asking(case, "backward")
    found = run(case)
    with use_backend("reference"):
        expected = run(case)
    for one, other in zip(found, expected, strict=True):
        # That of the zeros themselves is too large for float16.
        finite = other.isfinite()
        error = (one.double() - other.double())[finite].norm()
        assert error <= 3e-3 * (other[finite].double().norm() + 1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e20, math.inf, math.nan])
@pytest.mark.parametrize("name", ["ce", "kl", "contrastive", "siglip"])
def test_float16_keeps_what_upstream_gradients_are(name, value, halves):
    """Nothing is divided by zero, and what is not finite stays with its row."""
    case = make(name, dtype=torch.float16)
    grad = torch.ones(6)
    if math.isfinite(value):
        grad *= value
    else:
        grad[0] = value
    whole = Case(case.op, (*case.args, grad, "none", [True] + [False] * (case.leaves - 1)))
    of_x = next(out for out in run(whole) if out.ndim == 2)
    with use_backend("reference"):
        wanted = next(out for out in run(whole) if out.ndim == 2)
    rows = slice(None) if math.isfinite(value) or name == "contrastive" else slice(1, None)
    assert of_x[rows].isfinite().equal(wanted[rows].isfinite())
    if math.isfinite(value):
        scale = wanted.double().abs().max()
        torch.testing.assert_close(of_x.double(), wanted.double(), rtol=0, atol=4e-3 * scale + 1e-7)


@pytest.mark.parametrize("length", [4e-3, 2e3])
def test_lengths_of_normalised_rows_do_not_leave_float16(length, halves):
    case = make("cosines", dtype=torch.float16)
    x, w, scale, normalize = case.args
    grad = torch.full((6, 5), 300.0 if length < 1 else 1e-4).half()
    whole = Case(case.op, (x, w * length, scale, normalize, grad, "none", [True] * 3))
    found = run(whole)
    with use_backend("reference"):
        wanted = run(whole)
    for one, other in zip(found, wanted, strict=True):
        size = other.double().abs().max() if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=1e-2 * size + 1e-6)


@pytest.mark.parametrize("temperature", [0.01, 300.0])
def test_temperatures_do_not_leave_float16(temperature, halves):
    case = make("pairs", dtype=torch.float16)
    fields = OPERATORS["pair_kl"].arguments._fields
    case = with_argument(case, fields.index("temperature"), temperature)
    whole = asking(case, "reduced")
    found = run(whole)[-3]
    with use_backend("reference"):
        wanted = run(whole)[-3]
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3 * wanted.abs().max().item() + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_columns_leave_a_gradient_of_zero(dtype):
    case = make("siglip", dtype=dtype)
    x, w, *rest = case.args
    found = run(asking(Case(case.op, (x, w[:0], *rest)), "reduced"))
    for one in found:
        assert one.count_nonzero() == 0
