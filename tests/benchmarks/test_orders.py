"""The table over orders."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.embedded import compare, orders, studies


def line(method: str, order: str, seed: int, last: float) -> dict[str, Any]:
    numbers = {"average": 50.0, "forgetting": 1.0, "cil_last": 40.0}
    heads = {"head_last": last + 1, "head_cil_last": 45.0}
    return {
        "variant": method,
        "options": {"method": method, "order": order, "seed": seed},
        "transfer": 30.0,
        "zero_shot_transfer": 30.5,
        "last": last,
        **numbers,
        **heads,
    }


def test_the_unit_is_an_order() -> None:
    lines = [
        *(line("mulki", "I", seed, 80.0 + seed) for seed in (0, 1, 2)),  # 81
        line("mulki", "II", 0, 77.0),
        line("lwf", "I", 0, 78.0),  # 2 less
        line("lwf", "II", 0, 77.0),  # equal
        line("lwf", "III", 0, 10.0),  # of no pair
    ]
    rows = {
        row.strip("| ").split(" | ")[0]: row.strip("| ").split(" | ") for row in orders.table(lines)
    }
    place = 1 + list(orders.COLUMNS).index("last")
    # Student's t of one degree of freedom: 12.706 times half of the distance of two values.
    assert rows["mulki"][place] == "79.00 ± 25.41" and rows["mulki"][-1] == "4"
    assert rows["mulki less lwf"][place] == "+1.00 ± 12.71"
    assert rows["lwf"][1] == "-0.50 ± 0.00"
    assert "mulki less mulki" not in rows and len(rows) == 3


def test_one_order_has_no_interval() -> None:
    (row,) = orders.table([line("mulki", "I", 0, 80.0)])
    assert "| 80.00 | 1.00 |" in row and "±" not in row
    assert "| 81.00 | 45.00 | 1 |" in row


def test_every_row_runs_in_every_order_with_three_seeds() -> None:
    runs = studies.orders()
    assert len(studies.ORDERS) == 6
    assert len(runs) == 6 * 3 * len(studies.BY_ORDER)
    # One seed is complete before the next begins.
    seeds = [run.options["seed"] for run in runs]
    assert seeds == sorted(seeds) and len(studies.orders((7,))) == len(runs) // 3
    made = [run for run in runs if run.variant.endswith("made images")]
    assert {run.options["reference"] for run in made} == {"made"}
    for run in runs[: len(studies.BY_ORDER)]:
        compare.settings_of(run)  # its options exist


def test_results_of_orders_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "fingerprint", lambda: "pack")
    run = studies.orders()[0]
    made = {
        "pack": "pack",
        "study": "orders",
        "variant": run.variant,
        "options": run.options,
        "settings": compare.settings_of(run),
    }
    assert compare.standing([made, made | {"variant": "gone"}]) == [made]
