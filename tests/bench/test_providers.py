from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from mulki.bench.calls import calls_of
from mulki.bench.cases import (
    Case,
)
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS
from tests.bench.bench_helpers import CASE


def test_the_reference_is_asked_for_by_its_variable_and_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for before in (None, "auto"):
        if before is None:
            monkeypatch.delenv("MULKI_BACKEND", raising=False)
        else:
            monkeypatch.setenv("MULKI_BACKEND", before)
        with PROVIDERS["mulki-reference"].context(CASE):
            assert os.environ["MULKI_BACKEND"] == "reference"
            assert PROVIDERS["mulki"].note(CASE) == "served by reference"
        assert os.environ.get("MULKI_BACKEND") == before


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


def test_the_least_products_are_what_others_are_compared_with() -> None:
    results = measure_case(CASE, ("eager", "products"), ("both",), seconds=1e-9)
    by = {r.provider: r for r in results}
    assert by["products"].status == "timed" and by["products"].notes == (
        "5 products of torch.mm, forward and backward",
    )
    assert "speedup_over_products" in by["eager"].metrics
    # Nothing is computed that could be wrong, or take memory.
    assert not {"gradient_error", "memory"} & by["products"].metrics.keys()


@pytest.mark.slow
def test_compiled_eager_is_right() -> None:
    case = Case("dual_teacher_kl", 9, 7, 16, "bfloat16")
    (result,) = measure_case(case, ("compile",), ("both",), seconds=0.01)
    if result.status == "failed" and "ompiler" in str(result.notes):
        pytest.skip("torch.compile finds no C++ compiler")
    assert result.status == "timed", result.notes
