"""What is measured of providers at a case."""

from __future__ import annotations

import pytest

from mulki.bench import call_cost
from mulki.bench.point import measure_case
from mulki.bench.report import Quantiles
from tests.bench.bench_helpers import CASE, VERIFIED


def test_ratios_are_those_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both slow down together from round to round; the ratio does not."""

    def turns(
        calls: dict[str, object], seconds: float, least_rounds: int = 4
    ) -> dict[str, list[float]]:
        return {"eager": [1.0, 2.0, 4.0, 8.0], "mulki": [0.5, 1.0, 2.0, 4.0]}

    monkeypatch.setattr(call_cost, "take_turns", turns)
    results = measure_case(VERIFIED, ("eager", "mulki"), ("both",), seconds=0.01)
    ratio = results[1].metrics["speedup_over_eager"]
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    assert results[1].metrics["speed"].median == 1500.0
    rate = VERIFIED.operations("both") / 1e9
    assert results[1].metrics["throughput"].high == pytest.approx(
        Quantiles.of([rate / t for t in (0.5, 1.0, 2.0, 4.0)]).high
    )


def test_the_least_products_are_what_others_are_compared_with() -> None:
    results = measure_case(CASE, ("eager", "products"), ("both",), seconds=1e-9)
    by = {r.provider: r for r in results}
    assert by["products"].status == "timed" and by["products"].notes == (
        "5 products of torch.mm, forward and backward",
    )
    assert "speedup_over_products" in by["eager"].metrics
    # Nothing is computed that could be wrong, or take memory.
    assert not {"gradient_error", "memory"} & by["products"].metrics.keys()
