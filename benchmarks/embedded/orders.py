"""The table over orders: what a method gives on the average of six orders, and MulKI less it.

The unit is an order: the mean over its seeds is one value, and intervals are over orders. A choice
of seeds says little of another order, and half a point is less than two orders differ by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.embedded import studies
from mulki.runs.intervals import mean_interval

Line = Mapping[str, Any]

COLUMNS: dict[str, Callable[[Line], float]] = {
    "transfer less zero-shot": lambda line: line["transfer"] - line["zero_shot_transfer"],
    **{
        name: lambda line, name=name: line[name]
        for name in ("transfer", "average", "last", "forgetting", "cil_last")
    },
    "last, with head": lambda line: line["head_last"],
    "cil_last, with head": lambda line: line["head_cil_last"],
}


def by_order(lines: Sequence[Line], column: str) -> dict[str, dict[int, float]]:
    """Values of a column by order and seed."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        options = line["options"]
        found.setdefault(options["order"], {})[options["seed"]] = COLUMNS[column](line)
    return found


def value(lines: Sequence[Line], column: str) -> str:
    """Mean over orders, and half of its 95 % interval over them."""
    return _shown([mean(of.values()) for of in by_order(lines, column).values()], "")


def difference(ours: Sequence[Line], others: Sequence[Line], column: str) -> str:
    """The same of the difference between two methods, of the orders and seeds that both have."""
    mine, theirs = by_order(ours, column), by_order(others, column)
    values = []
    for order, of_order in mine.items():
        if seeds := of_order.keys() & theirs.get(order, {}).keys():
            values.append(mean(of_order[seed] - theirs[order][seed] for seed in seeds))
    return _shown(values, "+") if values else "-"


def table(lines: Sequence[Line]) -> list[str]:
    """Rows of Markdown cells: every method, then MulKI less each other one."""
    by_row: dict[str, list[Line]] = {name: [] for name in studies.BY_ORDER}
    for line in lines:
        by_row[line["variant"]].append(line)
    rows = [
        [name, *(value(of, column) for column in COLUMNS), str(len(of))]
        for name, of in by_row.items()
        if of
    ]
    rows += [
        [f"mulki less {name}", *(difference(by_row["mulki"], of, c) for c in COLUMNS), ""]
        for name, of in by_row.items()
        if of and by_row["mulki"] and name != "mulki"
    ]
    return [f"| {' | '.join(row)} |" for row in rows]


def _shown(values: Sequence[float], sign: str) -> str:
    middle, half = mean_interval(values)
    shown = f"{middle:{sign}.2f}"
    return shown if half is None else f"{shown} ± {half:.2f}"
