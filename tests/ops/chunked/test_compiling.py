"""Functions of blocks that inductor compiles."""

from __future__ import annotations

import pytest
import torch

from mulki.ops import use_backend
from tests.ops.op_cases import asking, make, run, with_argument
from tests.sweeps import mostly_long


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", mostly_long(["kl_label", "ce_all", "pairs_blend", "siglip"], "ce_all", "pairs_blend")
)
def test_compiled_for_all_sizes_at_once(name, monkeypatch):
    """The same results, and no other compilation for another batch size."""
    monkeypatch.setenv("MULKI_COMPILE", "1")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    compiled = []
    for n in (19, 31, 64):
        case = asking(make(name, n=n, p=23, d=8, dtype=torch.float32), "reduced")
        found = run(case)
        compiled.append(counters["stats"]["unique_graphs"])
        with use_backend("reference"):
            expected = run(case)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert 0 < compiled[0] == compiled[1] == compiled[2]


@pytest.mark.slow
def test_more_forms_than_torch_compiles_are_no_error(monkeypatch):
    monkeypatch.setenv("MULKI_COMPILE", "1")
    torch._dynamo.reset()
    plain = make("ce", n=5, p=6, d=3, dtype=torch.float32)
    with torch._dynamo.config.patch(recompile_limit=2):
        for smoothing in (0.0, 0.1, 0.2, 0.3, 0.4):
            case = with_argument(plain, 5, smoothing)
            with use_backend("reference"):
                wanted = run(case)[0]
            torch.testing.assert_close(run(case)[0], wanted, rtol=1e-4, atol=1e-5)
