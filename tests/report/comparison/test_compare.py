from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mulki.errors import InputError
from mulki.report.comparison.compare import compare
from mulki.report.comparison.groups import TITLES, over_orders
from mulki.report.comparison.tables import order_rows
from mulki.runs.metrics import HEAD_METRICS
from tests.report.report_helpers import PAIR as TASKS
from tests.report.report_helpers import Make, printed


def test_seeds_are_a_group_and_methods_are_compared(make: Make) -> None:
    runs = [make(f"{m}{s}", m, s, p) for m, p in (("lwf", 0.5), ("mulki", 0.8)) for s in (0, 1, 2)]
    found = compare(runs)
    assert found.warnings == ()
    (section,) = found.sections
    assert (section.name, section.tasks, section.baseline) == ("zoo, order I", TASKS, "lwf")
    assert [(g.label, len(g.runs)) for g in section.groups] == [("lwf", 3), ("mulki", 3)]
    lasts = [run.metrics["last"] for run in section.groups[1].runs]
    middle, half = section.groups[1].means["last"]
    assert middle == pytest.approx(np.mean(lasts))
    assert half == pytest.approx(4.30265 * np.std(lasts, ddof=1) / np.sqrt(3), rel=1e-4)
    (difference,) = section.differences
    assert (difference.label, difference.pairs, difference.over) == (
        "mulki", 3, "seeds and images"
    )  # fmt: skip
    assert list(difference.metrics) == [name for name in TITLES if name not in HEAD_METRICS]
    for name in ("transfer", "average", "last", "cil_average", "cil_last"):
        of = difference.metrics[name]
        means = [g.means[name][0] for g in section.groups]
        assert of.value == pytest.approx(means[1] - means[0], abs=1e-3)
        assert of.low is not None and of.high is not None and 0 < of.low < of.value < of.high < 60


def test_a_label_has_what_differs_within_a_method(make: Make) -> None:
    first = make("a", lr=0.1, gate="label", logs="x", workers=0, save_every=5, data_root="p")
    other = make("b", lr=0.2, gate="label", logs="y", workers=3, save_every=0, data_root="q")
    tuned = make("c", "lwf", lr=0.3)
    groups = compare([first, other, tuned]).sections[0].groups
    assert [g.label for g in groups] == ["mulki lr=0.1", "mulki lr=0.2", "lwf"]
    with pytest.raises(InputError, match="--baseline: mulki has 2 configurations.*lr=0.1"):
        compare([first, other], "mulki")
    assert compare([first, other], "mulki lr=0.2").sections[0].baseline == "mulki lr=0.2"
    # An option that is off, and one that mulki had not yet.
    off = make("e", lr=0.1, gate="label", other=None)
    groups = compare([first, off, other]).sections[0].groups
    assert [(g.label, len(g.runs)) for g in groups] == [("mulki lr=0.1", 2), ("mulki lr=0.2", 1)]
    unset = compare([first, make("d", gate="label")]).sections[0].groups
    assert [g.label for g in unset] == ["mulki lr=0.1", "mulki lr unset"]
    with pytest.raises(InputError, match='lwff .*"lwf"'):
        compare([first, tuned], "lwff")


def test_a_baseline_may_have_other_options_in_each_sequence(make: Make) -> None:
    other: dict[str, Any] = {"tasks": ("b", "c"), "iterations": 5}
    runs = [make("a", "lwf"), make("b"), make("c", "lwf", **other), make("d", **other)]
    found = compare(runs, "mulki")
    assert [section.baseline for section in found.sections] == ["mulki", "mulki"]
    assert [[d.label for d in s.differences] for s in found.sections] == [["lwf"], ["lwf"]]


def test_configurations_are_not_taken_together_over_orders(make: Make) -> None:
    back: dict[str, Any] = {"tasks": ("b", "a"), "order": "II"}
    runs = [
        make("a", "lwf", lr=0.1),
        make("b"),
        make("c", "lwf", lr=0.2, **back),
        make("d", **back),
    ]
    found = compare(runs)
    labels = [[group.label for group in section.groups] for section in found.sections]
    assert labels == [["lwf lr=0.1", "mulki"], ["lwf lr=0.2", "mulki"]]
    assert [section.baseline for section in found.sections] == ["lwf lr=0.1", "lwf lr=0.2"]
    assert [each.label for each in over_orders(found.sections)] == ["mulki"]
    both = [*runs, make("e", "lwf", lr=0.1, **back)]
    assert [e.label for e in over_orders(compare(both).sections)] == ["lwf lr=0.1", "mulki"]


def test_a_model_that_does_not_learn_is_paired_with_every_seed(make: Make) -> None:
    still = [make(f"z{seed}", "zero_shot", seed=seed, learns=False) for seed in (1, 9)]
    runs = [make(f"m{seed}", seed=seed, share=0.9) for seed in (0, 1)]
    for given in ([still[1], *runs], [*runs, still[1]]):
        found = compare(given)
        (difference,) = found.sections[0].differences
        assert (difference.pairs, difference.over, found.warnings) == (
            2, "seeds and images", ()
        )  # fmt: skip


def test_of_several_models_that_do_not_learn_any_stands_for_all(make: Make) -> None:
    still = [make(f"z{seed}", "zero_shot", seed=seed, learns=False) for seed in (0, 1)]
    runs = [make(f"m{seed}", seed=seed, share=0.9) for seed in (0, 1, 2)]
    for given in ([*still, *runs], [*runs, *still]):
        (difference,) = compare(given).sections[0].differences
        assert difference.pairs == 3


def test_other_seeds_make_no_pair(make: Make) -> None:
    found = compare([make("a", "lwf", 1), make("b", "mulki", 2)])
    assert found.sections[0].differences == ()
    assert found.warnings == ("zoo, order I: mulki and lwf have no seed in common",)


def test_runs_without_answers_are_compared_by_seeds_alone(make: Make) -> None:
    runs = [make(f"{m}{s}", m, s) for m in ("lwf", "mulki") for s in (0, 1)]
    shutil.rmtree(runs[0] / "answers")
    found = compare(runs)
    (difference,) = found.sections[0].differences
    gains = [
        our.metrics["last"] - other.metrics["last"]
        for other, our in zip(*(g.runs for g in found.sections[0].groups), strict=True)
    ]
    assert difference.over == "seeds"
    assert difference.metrics["last"].value == pytest.approx(np.mean(gains))
    low = np.mean(gains) - 12.7062 * np.std(gains, ddof=1) / np.sqrt(2)
    assert difference.metrics["last"].low == pytest.approx(low, rel=1e-4)
    assert any("intervals over seeds alone, since answers are missing" in w for w in found.warnings)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hashes": {"weights": "v", "tasks": {"a": "t", "b": "t"}}}, "start weights of"),
        ({"hashes": {"weights": "w", "tasks": {"a": "t", "b": "u"}}}, "images or prompts of"),
        ({"label_space": "all"}, "label spaces of"),
        ({"images": 150}, "sizes of test sets of"),
        ({"model": "RN50"}, "start models of"),
    ],
)
def test_what_should_be_the_same_is_warned_of(
    make: Make, options: dict[str, Any], says: str
) -> None:
    one, other = make("a", "lwf"), make("b", "mulki", **options)
    found = compare([one, other])
    assert found.warnings[0] == f"zoo, order I: {says} {other} differ from those of {one}"
    same_images = says in ("start weights of", "start models of", "label spaces of")
    assert found.sections[0].differences[0].over == ("images" if same_images else "nothing")
    assert any("since test images differ" in w for w in found.warnings) == (not same_images)


HASHES = {
    "weights": "w",
    "tasks": {"a": "t"},
    "prompts": {"a": "p"},
    "splits": {"a": "s"},
    "tests": {"a": "e"},
}


@pytest.mark.parametrize(
    ("differs", "says"),
    [
        ("prompts", "prompts"),
        ("splits", "training images of seed 0"),
        ("tests", "test images"),
    ],
)
def test_prompts_and_images_are_told_apart(make: Make, differs: str, says: str) -> None:
    one = make("a", "lwf", hashes=HASHES)
    other = make("b", "mulki", hashes={**HASHES, "tasks": {"a": "u"}, differs: {"a": "x"}})
    found = compare([one, other])
    assert found.warnings[0] == f"zoo, order I: {says} of {other} differ from those of {one}"
    assert sum("differ from those" in warning for warning in found.warnings) == 1
    over = found.sections[0].differences[0].over
    assert over == ("nothing" if differs == "tests" else "images")
    assert any("has no interval, since test images differ" in w for w in found.warnings) == (
        differs == "tests"
    )


def test_runs_that_go_on_are_compared_by_the_images_of_new_tasks(make: Make) -> None:
    both = {**HASHES, "splits": {"a": "s", "b": "s"}}
    one = make("a", hashes=both)
    same = make("b", "lwf", hashes=both | {"splits": {"a": "nothing", "b": "s"}})
    other = make("c", "lwf", lr=1, hashes=both | {"splits": {"a": "nothing", "b": "x"}})
    for folder in (same, other):
        environment = json.loads((folder / "env.json").read_text())
        (folder / "env.json").write_text(json.dumps(environment | {"learned_before": ["a"]}))
    says = f"zoo, order I: training images of seed 0 of {{}} differ from those of {one}"
    assert compare([one, same, other]).unlike == (says.format(other),)
    fresh = make("d", "lwf", lr=2, hashes=both | {"splits": {"a": "x", "b": "s"}})
    assert compare([one, same, fresh]).unlike == (says.format(fresh),)


def test_training_images_may_differ_by_seed(make: Make) -> None:
    # As a few images of each class do.
    runs = [
        make(f"{m}{s}", m, s, hashes=HASHES | {"tasks": {"a": f"t{s}"}, "splits": {"a": f"s{s}"}})
        for m in ("lwf", "mulki")
        for s in (0, 1)
    ]
    found = compare(runs)
    assert found.warnings == ()
    assert found.sections[0].differences[0].over == "seeds and images"


def test_a_run_whose_earlier_tasks_have_no_row_is_no_fresh_one(make: Make) -> None:
    one = make("a")
    whole, part = (make(name, **{"continue": "logs/x"}, seed=i) for i, name in ((1, "b"), (2, "c")))
    for folder, before in ((whole, ["a"]), (part, ["a", "z"])):
        environment = json.loads((folder / "env.json").read_text())
        (folder / "env.json").write_text(json.dumps(environment | {"learned_before": before}))
    groups = compare([one, whole, part]).sections[0].groups
    assert {group.label: len(group.runs) for group in groups} == {
        "mulki learned before=nothing": 2,
        "mulki learned before=z": 1,
    }


def test_a_run_whose_earlier_tasks_had_other_options_is_no_fresh_one(make: Make) -> None:
    one, same, other = (make(name, seed=i) for i, name in enumerate("abc"))
    third = make("d", seed=3)
    for folder, tasks, options in (
        (same, 1, {"name": "x"}),
        (other, 1, {"method": "lwf"}),
        (third, 2, {"method": "lwf"}),
    ):
        learned = {"learned_with": [{"tasks": tasks, "options": options}]}
        environment = json.loads((folder / "env.json").read_text())
        (folder / "env.json").write_text(json.dumps(environment | learned))
    groups = compare([one, same, other, third]).sections[0].groups
    assert [len(group.runs) for group in groups] == [2, 1, 1]
    assert groups[0].label == "mulki earlier options=the same"
    assert groups[1].label.startswith("mulki earlier options=others (")
    (other / "env.json").write_text('{"learned_with": null}')
    assert 'c: "learned_with" in its env.json' in compare([one, same, other]).warnings[0]


def test_a_folder_of_runs_stands_for_all_of_them_and_their_grids(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, damaged = make("a", "lwf"), make("d", "lwf", seed=1)
    (damaged / "args.yaml").unlink()
    (tmp_path / "grid").mkdir()
    for name in ("b", "c"):
        make(name, seed=name == "c").rename(tmp_path / "grid" / name)
    (tmp_path / "grid" / "comparison.txt").touch()
    real = Path.is_file
    private = tmp_path / "private"
    private.mkdir()
    (tmp_path / ".git").mkdir()
    with monkeypatch.context() as patch:

        def is_file(path: Path) -> bool:
            if path.parent == private:
                raise PermissionError(13, "Permission denied")
            return real(path)

        patch.setattr(Path, "is_file", is_file)
        found = compare([tmp_path])
        named = compare([*sorted(tmp_path.iterdir())])
    for each in (found, named):
        assert any(f"{private}: left out" in warning for warning in each.warnings)
    assert not any(".git" in warning for warning in found.warnings)
    assert [len(group.runs) for group in found.sections[0].groups] == [1, 2]
    assert found.sections[0].groups[0].runs[0].path == alone
    assert any(warning.startswith(f"{damaged}: left out, ") for warning in found.warnings)


def test_vocabularies_are_compared_where_there_are_some(make: Make) -> None:
    hashes = {"weights": "w", "tasks": {"a": "t", "b": "t"}}
    runs = [make("a", "lwf"), make("b", hashes=hashes | {"vocabulary": "u"})]
    assert not any("vocabularies" in warning for warning in compare(runs).warnings)
    runs.append(make("c", "lwf_vr", hashes=hashes | {"vocabulary": "v"}))
    says = f"zoo, order I: vocabularies of {runs[2]} differ from those of {runs[1]}"
    assert says in compare(runs).warnings


def test_numbers_of_processes_are_compared(make: Make) -> None:
    one, other = make("a"), make("b", "lwf")
    environment = json.loads((other / "env.json").read_text())
    assert environment["processes"] == 1
    (other / "env.json").write_text(json.dumps(environment | {"processes": 2}))
    says = f"zoo, order I: numbers of processes of {other} differ from those of {one}"
    assert says in compare([one, other]).warnings


def test_incomplete_runs_are_left_out(make: Make) -> None:
    whole, part = make("a"), make("b", seed=1, ends=False)
    found = compare([whole, part])
    assert found.warnings == (f"{part}: left out, interrupted after 1 of 2 tasks",)
    assert [g.runs[0].path for g in found.sections[0].groups] == [whole]
    with pytest.raises(InputError, match="no complete run to compare"):
        compare([part])


def test_a_seed_or_folder_that_comes_twice(make: Make) -> None:
    one, again = make("a"), make("b")
    assert compare([one, one]).warnings == ()
    for same in (one, one.parent / ".." / one.parent.name / one.name):
        assert len(compare([one, same]).sections[0].groups[0].runs) == 1
    found = compare([one, again, make("c", seed=1, share=0.7)])
    assert "mulki has several runs of one seed" in found.warnings[0]
    # An interval is over seeds, and there are two of them.
    (group,) = found.sections[0].groups
    _, half = group.means["last"]
    lasts = [run.metrics["last"] for run in group.runs]
    assert half == pytest.approx(12.7062 * abs(np.mean(lasts[:2]) - lasts[2]) / 2, rel=1e-4)


def test_sequences_are_compared_apart(make: Make) -> None:
    others = {"tasks": ("b", "a")}
    runs = [make("a", "lwf"), make("b", "mulki"), make("c", "lwf", **others)]
    found = compare([*runs, make("d", "mulki", **others)])
    assert [section.tasks for section in found.sections] == [("a", "b"), ("b", "a")]
    assert all(len(section.differences) == 1 for section in found.sections)
    with pytest.raises(InputError, match="configurations"):
        compare([runs[1], runs[2]])
    # One method in two orders is no comparison, but two tables.
    assert len(compare([runs[0], runs[2]]).sections) == 2
    assert compare(runs, "mulki").warnings[-1] == (
        "zoo, order I: no run of the baseline mulki, so no differences"
    )


def test_class_incremental_sequences_have_their_steps_in_the_name(make: Make) -> None:
    (section,) = compare([make("a", scenario="cil"), make("b", "lwf", scenario="cil")]).sections
    assert section.name == "zoo in 2 steps, order I"


def test_orders_of_several_sequences_are_told_apart(make: Make) -> None:
    runs = [
        make(f"{method}{number}", method, tasks=tasks)
        for method in ("lwf", "mulki")
        for number, tasks in enumerate((("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")))
    ]
    found = compare(runs)
    assert len({each["sequence"] for each in found.to_dict()["orders"]}) == 1  # all have one name
    names = [f"{'zoo' if s.tasks[0] in 'ab' else 'sea'}, order I" for s in found.sections]
    sections = [replace(s, name=name) for s, name in zip(found.sections, names, strict=True)]
    rows = order_rows(sections, ["last"])
    labels = ("lwf", "mulki", "mulki less lwf")
    assert [row.label for row in rows] == [f"{of}: {x}" for of in ("zoo", "sea") for x in labels]


def test_orders_have_one_baseline(make: Make) -> None:
    # The second order is given the other way round, and the third lacks the first method.
    others: list[dict[str, Any]] = [{"tasks": ("b", "a")}, {"tasks": ("c", "d")}]
    runs = [make("a", "lwf"), make("b", share=0.9)]
    runs += [make("c", share=0.9, **others[0]), make("d", "lwf", **others[0])]
    runs += [make("e", share=0.9, **others[1]), make("f", "snd", **others[1])]
    found = compare(runs)
    assert [section.baseline for section in found.sections] == ["lwf", "lwf", "mulki"]
    (less,) = (each for each in found.to_dict()["orders"] if each["baseline"])
    assert (less["label"], less["baseline"], less["difference_orders"]) == ("mulki", "lwf", 2)
    assert less["differences"]["last"]["value"] > 20
    assert re.search(r"mulki less lwf .* 2\s*$", printed(found), re.MULTILINE)


def no_options(path: Path) -> str:
    (path / "args.yaml").unlink()
    return "args.yaml is not there"


def other_options(path: Path) -> str:
    (path / "args.yaml").write_text("- 1\n")
    return "args.yaml: not the options of a run"


def no_matrix(path: Path) -> str:
    (path / "matrix.csv").unlink()
    return "matrix.csv is not there"


def damaged_answers(path: Path) -> str:
    (path / "answers" / "01_a.npz").write_bytes(b"")
    return "01_a.npz: cannot be read"


def damaged_results(path: Path) -> str:
    lines = map(json.loads, (path / "results.jsonl").read_text().splitlines())
    text = "".join(f"{json.dumps({**line, 'value': 101})}\n" for line in lines)
    (path / "results.jsonl").write_text(text)
    return 'results.jsonl: classes seen after "'


def other_bytes(path: Path) -> str:
    (path / "args.yaml").write_bytes(b"seed: \xff")
    return "args.yaml: not UTF-8"


def other_tasks(path: Path) -> str:
    text = (path / "args.yaml").read_text()
    text = re.sub(r"tasks:(\n *- .*)+|tasks: .*", "tasks: {a: 1}", text)
    (path / "args.yaml").write_text(text)
    return "args.yaml: not the options of a run"


def damaged_environment(path: Path) -> str:
    (path / "env.json").write_text('{"hashes": [1]}')
    return 'env.json: "hashes" is not what a run writes'


def damaged_hashes(path: Path) -> str:
    (path / "env.json").write_text('{"hashes": {"prompts": {}, "splits": null, "tests": {}}}')
    return 'env.json: "splits" is not what a run writes'


@pytest.mark.parametrize(
    "damage",
    [
        *(damaged_results, no_options, other_options, no_matrix, damaged_answers),
        *(damaged_environment, damaged_hashes, other_bytes, other_tasks),
    ],
)
def test_damaged_runs_are_named_and_left_out(make: Make, damage: Callable[[Path], str]) -> None:
    good, bad = make("a", "lwf"), make("b")
    says = damage(bad)
    found = compare([good, bad])
    assert [g.runs[0].path for g in found.sections[0].groups] == [good]
    (warning,) = found.warnings
    assert warning.startswith(f"{bad}: left out, ") and says in warning
    with pytest.raises(InputError, match=re.escape(warning)):
        compare([bad])


def test_what_is_no_run_is_refused_or_left_out(make: Make, tmp_path: Path) -> None:
    good = make("a", "lwf")
    empty, page, gone = (tmp_path / name for name in ("empty", "other.html", "gone"))
    empty.mkdir()
    page.touch()  # no file of a grid
    found = compare([empty, good, page])
    assert found.warnings == (f"{empty}, {page}: left out, not the folder of a run",)
    assert [group.runs[0].path for group in found.sections[0].groups] == [good]
    for bad in ([gone, good], [good, empty, gone], [empty], [page, empty]):
        with pytest.raises(InputError, match=f"^{gone if gone in bad else bad[0]}: "):
            compare(bad)


def test_what_makes_runs_unlike_is_told_from_other_warnings(make: Make) -> None:
    runs = [make("a", "lwf"), make("b", "mulki", protocol="zscl"), make("c", "mulki", seed=1)]
    found = compare(runs)
    assert found.unlike == (f"zoo, order I: protocols of {runs[1]} differ from those of {runs[0]}",)
    assert {*found.unlike} < {*found.warnings}
