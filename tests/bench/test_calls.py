"""The matrix products that a case takes at the least."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mulki.bench.calls import calls_of
from mulki.bench.cases import Case
from mulki.bench.providers import PROVIDERS


@pytest.mark.parametrize(("operator", "count"), [("dual_teacher_kl", 5), ("similarity", 3)])
def test_the_least_products_of_a_case(
    operator: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(operator, 9, 7, 16, "float32")
    inputs = case.inputs()
    products: list[tuple[int, ...]] = []
    right = torch.mm

    def mm(a: Tensor, b: Tensor, **options: Tensor) -> Tensor:
        products.append((*a.shape, b.shape[1]))
        return right(a, b, **options)

    monkeypatch.setattr(torch, "mm", mm)
    calls = calls_of(PROVIDERS["products"], case, inputs)
    for mode, wanted in {"forward": count - 2, "backward": 2, "both": count}.items():
        products.clear()
        assert calls.seconds(mode, ahead=False) > 0 and len(products) == wanted
    assert products == [(9, 16, 7)] * (count - 2) + [(9, 7, 16), (7, 9, 16)]
