"""What the references share: logits without rounding."""

from __future__ import annotations

import pytest
import torch

from mulki.ops.logits import logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_multiplied_in_float32_even_under_autocast(unit, dtype):
    x, w = unit(6, 4).to(dtype), unit(5, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        z = logits(x, w, 9.0)
    assert z.dtype == torch.float32
    assert z.equal(9.0 * (x.float() @ w.float().T))
    assert logits(x.double(), w.double(), torch.tensor(9.0)).dtype == torch.float64


def test_masked_classes_have_probability_zero(unit):
    x, w, mask = unit(6, 4), unit(5, 4), torch.tensor([True, False, True, True, False])
    z = logits(x, w, 9.0, mask)
    assert z.softmax(1)[:, ~mask].eq(0).all()
    assert z[:, mask].equal(logits(x, w, 9.0)[:, mask])
