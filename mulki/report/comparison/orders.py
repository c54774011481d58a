"""Over several orders of the same tasks: means and differences, with 95 % intervals.

The order in which tasks are learned is chance too, and a larger one than the seed. An order counts
once, with the mean over its seeds; intervals are those of Student's t over orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mulki.runs.intervals import Difference, mean_interval, seed_differences

if TYPE_CHECKING:
    from mulki.report.comparison.groups import Section


@dataclass(frozen=True)
class OverOrders:
    """What a group of runs comes to over several orders.

    Args:
        label: of the group in the sections.
        orders: how many sections have it.
        means: mean and half of its interval, by metric.
        differences: from the baseline, by metric, over the sections that compare with it.
        baseline: its label; None for the baseline itself.
        compared: how many sections those are.
    """

    label: str
    orders: int
    means: dict[str, tuple[float, float | None]]
    differences: dict[str, Difference]
    baseline: str | None
    compared: int

    def to_dict(self) -> dict[str, Any]:
        """The numbers for JSON."""
        return {
            "label": self.label,
            "orders": self.orders,
            "metrics": {n: {"mean": m, "half_width": h} for n, (m, h) in self.means.items()},
            "baseline": self.baseline,
            "difference_orders": self.compared,
            "differences": {n: vars(each) for n, each in self.differences.items()},
        }


def over_orders(sections: Sequence[Section]) -> list[OverOrders]:
    """Combine the sections that learned the same tasks in different orders.

    Returns:
        One for each group that two of them or more have, in the order of the first section.
    """
    by_tasks: dict[frozenset[str], list[Section]] = {}
    for section in sections:
        by_tasks.setdefault(frozenset(section.tasks), []).append(section)
    return [
        each
        for of_tasks in by_tasks.values()
        for label in dict.fromkeys(g.label for section in of_tasks for g in section.groups)
        if (each := _combined(label, of_tasks)) is not None
    ]


def _combined(label: str, sections: Sequence[Section]) -> OverOrders | None:
    groups = [group for section in sections for group in section.groups if group.label == label]
    if len(groups) < 2:
        return None
    values = [{name: mean for name, (mean, _) in group.means.items()} for group in groups]
    shared = [name for name in values[0] if all(name in each for each in values)]
    differences = [
        (section.baseline, {name: each.value for name, each in difference.metrics.items()})
        for section in sections
        for difference in section.differences
        if difference.label == label
    ]
    # A mean over differences from several baselines would be one from none of them.
    baseline = differences[0][0] if differences else None
    against = [metrics for of, metrics in differences if of == baseline]
    none = [dict.fromkeys(each, 0.0) for each in against]
    return OverOrders(
        label,
        len(groups),
        {name: mean_interval([each[name] for each in values]) for name in shared},
        seed_differences(against, none) if against else {},
        baseline,
        len(against),
    )
