"""The reference, which all else is held against, is the plain formulas: exactly, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mulki.bench.cases import VARIANTS, variant
from mulki.bench.losses import EAGER, MULKI
from mulki.bench.outcomes import outcome
from mulki.ops import use_backend
from mulki.ops.logits import logits
from tests.ops.oracle import REDUCTIONS, computed, same


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_are_those_of_plain_pytorch(name: str) -> None:
    """Of `cross_entropy`, `kl_div`, `logsigmoid` and of one product, as users write them."""
    case = variant(name, 11, 13, 7)
    inputs = case.inputs(torch.float64)
    similarity = case.operator == "similarity"
    for reduction in ("none",) if similarity else REDUCTIONS:
        asked = {} if similarity else {"reduction": reduction}
        wanted = outcome(EAGER[case.operator], inputs, **asked)
        with use_backend("reference"):
            found = computed(case.operator, inputs, reduction)
        same(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["kl", "kl_confidence", "kl_weights"])
def test_details_by_plain_arithmetic(name: str) -> None:
    case = variant(name)
    inputs = case.inputs(torch.float64)
    *student, teachers, _ = inputs.arguments
    _, details = inputs.call(MULKI[case.operator], reduction="none", return_details=True)
    mask = inputs.options.get("class_mask")
    t, t2 = inputs.options.get("temperature", 2.0), inputs.options.get("scale_by_t2", True)

    def probabilities(x: Tensor, w: Tensor, scale: Tensor, i: int) -> list[float]:
        z = (scale * x[i] @ w.T / t).tolist()
        powers = [math.exp(v) if mask is None or mask[j] else 0.0 for j, v in enumerate(z)]
        return [power / sum(powers) for power in powers]

    for i in range(case.n):
        q = probabilities(*student, i)
        for k, teacher in enumerate(teachers):
            p = probabilities(*teacher, i)
            kl = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a)
            entropy = -sum(a * math.log(a) for a in p if a)
            assert details.kl[i, k].item() == pytest.approx(kl * (t**2 if t2 else 1), rel=1e-9)
            assert details.entropy[i, k].item() == pytest.approx(entropy, rel=1e-9)


def test_pairs_are_a_distillation_in_either_direction() -> None:
    case = variant("pairs_label")
    x, w, scale, ((u, v, s),), _ = case.inputs(torch.float64).arguments
    own, options = torch.arange(6), {"gate": "label", "reduction": "none", "return_details": True}
    with use_backend("reference"):
        loss, both = MULKI["pair_kl"](x, w, scale, ((u, v, s),) * 2, own, **options)
        rows, of_rows = MULKI["teacher_kl_3"](x, w, scale, ((u, v, s),) * 2, own, **options)
        columns, of_columns = MULKI["teacher_kl_3"](w, x, scale, ((v, u, s),) * 2, own, **options)
    torch.testing.assert_close(loss, (rows + columns) / 2)
    for one, *sides in zip(both, of_rows, of_columns, strict=True):
        torch.testing.assert_close(one, torch.stack(sides))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_multiplied_in_float32_even_under_autocast(dtype: torch.dtype) -> None:
    x, w, _ = variant("similarity").inputs(dtype).arguments
    with torch.autocast("cpu", torch.bfloat16):
        z = logits(x, w, 9.0)
    assert z.dtype == torch.float32
    assert z.equal(9.0 * (x.float() @ w.float().T))
