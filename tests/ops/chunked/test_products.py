"""Products of half precision: as they are where torch has them, and cast elsewhere."""

from __future__ import annotations

import pytest
import torch

from mulki.ops.chunked import products
from mulki.ops.chunked.products import Products, multiplies_halves
from tests.ops.chunked.cut import TOLERANCES, same_as_the_reference
from tests.ops.op_cases import NAMES


def test_the_cpu_casts_some_rows_at_a_time(monkeypatch):
    assert not multiplies_halves("cpu")
    monkeypatch.setattr(products, "_CAST", 20)
    x, w = (torch.randn(n, 5).bfloat16() for n in (3, 11))
    model, out = Products(x, w), torch.empty(3, 11)
    assert [len(part) for _, part in model._parts(w)] == [4, 4, 3]
    model.logits(slice(0, 3), slice(0, 11), out)
    torch.testing.assert_close(out, x.float() @ w.float().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_g_is_rounded_where_halves_are_multiplied(name, dtype, monkeypatch, cut_small):
    """As on a GPU, by products that are cast here; float16 does not lose small values of G."""
    seen = set()

    def multiply(a, b, out, add=False):
        seen.add(a.dtype)
        assert a.dtype == b.dtype == dtype and out.dtype == torch.float32
        product = a.float() @ b.float()
        if add:
            out.add_(product)
        else:
            out.copy_(product)

    monkeypatch.setattr(products, "_multiply", multiply)
    monkeypatch.setattr(products, "multiplies_halves", lambda device_type: True)
    assert TOLERANCES[dtype] < 0.1
    same_as_the_reference(name, (dtype,))
    assert seen == {dtype}
