"""Calls by kept launches: the same bits as by new ones, on memory full of NaN."""

from __future__ import annotations

import pytest
import torch

from mulki.kernels import schedule
from mulki.kernels.lookup import kernel
from mulki.ops import backends, prepared, use_backend
from mulki.ops.operators import OPERATORS, Request
from tests.kernels.triton_cases import NAMES, Case, make
from tests.kernels.triton_checks import in_one_memory

# Of no other launches than ce_all, kl_blend and siglip.
ALIKE = ("ce", "kl_confidence", "siglip_block")
# A sum is a mean but for a number.
WAYS = (("none", False), ("mean", True), ("mean", False))


def arguments(name, dtype, seed):
    case = make(name, dtype, 6, 11, 20)
    generator = torch.Generator().manual_seed(seed)
    args = [
        (torch.randn(a.shape, generator=generator) / 4).to(dtype) if i < 2 else a
        for i, a in enumerate(case.args)
    ]
    return case, args


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in NAMES if name not in ALIKE),
        *((name, torch.float16) for name in ("ce_all", "kl_weights", "pairs_weights", "siglip")),
    ],
)
def test_kept_launches_give_the_same_bits(name, dtype, monkeypatch):
    monkeypatch.setattr(prepared, "MOST_STEPS", 200)  # filling memory with NaN takes some
    asked = 0
    with use_backend("triton"):
        for reduction, upstream in WAYS:
            before = None
            for seed in (0, 0, 1):  # the second is recorded; the third, of other numbers, is kept
                case, args = arguments(name, dtype, seed)
                operator = OPERATORS[case.op]
                if reduction not in operator.reductions:
                    continue
                x, shape = operator.arguments(*args), ()
                if upstream and reduction == "none":
                    shape = operator.rows(x)
                labels = getattr(x, "labels", False)
                grad = torch.full((2,) if labels else shape, 0.7) if upstream else None
                wanted = [reduction != "none" or upstream] * operator.leaves
                request = Request(grad, reduction, wanted)
                found = backends.call(operator, *x, *request)
                # The first stands for the second, of the same numbers.
                same = kernel(case.op)(x, request) if before is None or seed else before
                before = same
                for one, other in zip(found, same, strict=True):
                    assert one.dtype == other.dtype and torch.equal(one, other)
            asked += reduction in operator.reductions
        kept = [callable(one) for one in prepared.calls.values()]
    assert kept == [True] * asked and kept


@pytest.mark.parametrize("name", ["kl_blend", "pairs_weights"])
def test_kept_launches_of_models_in_one_memory(name, monkeypatch):
    """Calls whose operands differ in nothing but how far apart they lie."""
    monkeypatch.setattr(prepared, "MOST_STEPS", 200)
    plan = schedule.Plan("chunks", 6, 11)
    monkeypatch.setattr(schedule, "plan", lambda problem: plan)
    with use_backend("triton"):
        for apart in (0, 8, None):
            for seed in range(3):
                case, args = arguments(name, torch.float32, seed)
                of_models = Case(case.op, tuple(args))
                if apart is not None:
                    of_models = in_one_memory(of_models, apart=apart)
                operator = OPERATORS[case.op]
                x = operator.arguments(*of_models.args)
                request = Request(None, "mean", [True] * operator.leaves)
                found = backends.call(operator, *x, *request)
                for one, other in zip(found, kernel(case.op)(x, request), strict=True):
                    assert torch.equal(one, other)
        kept = [callable(one) for one in prepared.calls.values()]
    assert kept == [True] * 3
