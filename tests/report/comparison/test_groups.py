from __future__ import annotations

import json
import shutil
from dataclasses import fields

import pytest

from mulki.report.comparison.compare import compare
from mulki.report.comparison.groups import NEUTRAL, Against, Group, Section, over_orders
from mulki.runs.intervals import Difference
from mulki.train.config.run_config import RunConfig
from tests.report.report_helpers import Make, printed


def test_options_that_change_no_result_exist() -> None:
    known = {field.name.rstrip("_") for field in fields(RunConfig)}
    assert known >= NEUTRAL


def test_json_and_tables_have_the_same_numbers(make: Make) -> None:
    runs = [make("a", "lwf"), make("b", "mulki", share=0.7), make("c", "mulki", 1, share=0.7)]
    found = compare(runs, "mulki")
    numbers = json.loads(json.dumps(found.to_dict()))
    (section,) = numbers["sections"]
    assert section["baseline"] == "mulki" and [g["label"] for g in section["groups"]] == [
        "lwf", "mulki"
    ]  # fmt: skip
    assert section["groups"][1]["seeds"] == [0, 1]
    assert section["groups"][0]["metrics"]["last"]["half_width"] is None
    text = printed(found)
    last = section["groups"][1]["metrics"]["last"]
    assert f"{last['mean']:.2f} ± {last['half_width']:.2f}" in text
    of = section["differences"][0]["metrics"]["cil_last"]
    assert f"{of['value']:+.2f} [{of['low']:+.2f}, {of['high']:+.2f}]" in text
    assert f"warning: {numbers['warnings'][0]}" in text.splitlines()
    assert "zoo, order I: lwf and mulki make 1 pair of runs" in numbers["warnings"]


def test_what_is_used_beside_the_tasks_is_told(make: Make) -> None:
    paths = [
        make("a"),
        make("b", anchors="both", uses=("class names of earlier tasks", "a vocabulary of words")),
        make("c", reference="x", uses=("reference images",)),
        make("d", reference="y"),
    ]
    summary = json.loads((paths[-1] / "summary.json").read_text())
    # A folder that was written before runs kept this.
    del summary["uses"]
    (paths[-1] / "summary.json").write_text(json.dumps(summary))
    assert [group.uses for group in compare(paths).sections[0].groups] == [
        "-",
        "class names of earlier tasks, a vocabulary of words",
        "reference images",
        "unknown",
    ]


def test_runs_before_class_incremental_evaluation_leave_its_cells_empty(make: Make) -> None:
    run = make("a")
    shutil.rmtree(run / "answers")
    lines = (run / "results.jsonl").read_text().splitlines(keepends=True)
    without = [line for line in lines if "acc1_seen" not in line]
    (run / "results.jsonl").write_text("".join(without))
    found = compare([run])
    assert list(found.sections[0].groups[0].means) == [
        "transfer", "average", "last", "forgetting"
    ]  # fmt: skip
    assert printed(found).splitlines()[3].split()[-4:] == ["-", "-", "1", "-"]


def test_an_option_that_is_off_is_as_one_that_was_not_there_yet(make: Make) -> None:
    older, newer = make("a", seed=0), make("b", seed=1, original=None)
    (group,) = compare([older, newer]).sections[0].groups
    assert [run.path for run in group.runs] == [older, newer]
    others = compare([older, make("c", seed=1, original="x")]).sections[0].groups
    assert [group.label for group in others] == ["mulki original unset", "mulki original=x"]


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
