from __future__ import annotations

import pytest

from mulki.report.comparison.groups import Against, Group, Section
from mulki.report.comparison.orders import over_orders
from mulki.runs.intervals import Difference


class Fixed(Group):
    """A group with given means."""

    def __init__(self, label: str, **means: float):
        super().__init__(label, ())
        object.__setattr__(self, "fixed", {name: (value, None) for name, value in means.items()})

    @property
    def means(self) -> dict[str, tuple[float, float | None]]:
        return self.fixed  # type: ignore[attr-defined, no-any-return]


def section(tasks: str, base: float, ours: float | None = None) -> Section:
    groups = [Fixed("finetune", last=base)]
    differences = []
    if ours is not None:
        groups.append(Fixed("mulki", last=ours, transfer=1.0))
        gain = {"last": Difference(ours - base, None, None)}
        differences.append(Against("mulki", 1, "nothing", gain))
    return Section(tasks, tuple(tasks), tuple(groups), "finetune", tuple(differences))


def test_orders_of_the_same_tasks_count_once_each() -> None:
    base, ours = over_orders([section("abc", 70, 75), section("cab", 72, 79)])
    assert (base.label, base.orders, base.baseline) == ("finetune", 2, None)
    middle, half = base.means["last"]
    # Student's t with one degree of freedom, 12.706, times sqrt(2) / sqrt(2).
    assert middle == 71 and half == pytest.approx(12.706, abs=1e-3)
    assert base.differences == {}
    assert (ours.label, ours.baseline, ours.means.keys()) == (
        "mulki",
        "finetune",
        {"last", "transfer"},
    )
    less = ours.differences["last"]
    assert less.value == 6 and less.low == pytest.approx(6 - 12.706, abs=1e-3)
    assert ours.to_dict()["differences"]["last"]["value"] == 6


def test_differences_from_several_baselines_are_not_averaged() -> None:
    other = Section(
        "bca",
        ("b", "c", "a"),
        (Fixed("lwf", last=60), Fixed("mulki", last=90)),
        "lwf",
        (Against("mulki", 1, "nothing", {"last": Difference(30, None, None)}),),
    )
    _, ours = over_orders([section("abc", 70, 75), other, section("cab", 72, 79)])
    assert (ours.label, ours.orders, ours.baseline, ours.compared) == ("mulki", 3, "finetune", 2)
    assert ours.differences["last"].value == 6
    assert ours.to_dict()["difference_orders"] == 2


def test_what_one_order_alone_has_is_left_out() -> None:
    assert over_orders([section("abc", 70, 75)]) == []
    assert over_orders([section("abc", 70), section("abd", 70)]) == []
    (base,) = over_orders([section("abc", 70, 75), section("cab", 72)])
    assert base.label == "finetune"
