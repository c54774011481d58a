"""The comparison on the bundled tasks: what is kept of a run, and the tables made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.embedded import compare, figures, studies
from benchmarks.embedded.packed_answers import pack, unpack
from mulki.clip.models import BUNDLED
from mulki.errors import InputError
from mulki.runs.intervals import RunAnswers
from mulki.runs.metrics import compute_metrics
from mulki.train.config import presets
from tests import train_helpers

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model
SIZES = {"a": 50, "b": 31, "c": 7}


def answers(seed: int, share: float = 0.5) -> RunAnswers:
    random = np.random.default_rng([seed, int(100 * share)])
    own, seen = ({t: random.random((3, n)) < share for t, n in SIZES.items()} for _ in range(2))
    return RunAnswers(own, seen)


def line(
    method: str, seed: int, share: float, kept: bool = True, variant: str = "", **options: Any
) -> dict[str, Any]:
    of = answers(seed, share)
    a = np.array([own.mean(axis=1) for own in of.own.values()]).T * 100
    found = {
        "variant": variant or method,
        "study": "ablate" if variant else "compare",
        "options": {"method": method, "seed": seed, **options},
        **compute_metrics(a).to_dict(),
        "uses": [],
    }  # fmt: skip
    if kept:
        found |= {"answers": pack(of), "cil_average": 10.0, "cil_last": 5.0}
    return json.loads(json.dumps(found))


def rows(text: str, *first: str) -> list[list[str]]:
    cells = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in text.splitlines()
        if row.startswith("| ")
    ]
    return [row[len(first) :] for row in cells if row[: len(first)] == list(first)]


def test_answers_come_back_from_a_line() -> None:
    of = answers(0)
    found = unpack(json.loads(json.dumps(pack(of))))
    assert found.sizes == of.sizes == SIZES
    for ours, wanted in ((found.own, of.own), (found.seen, of.seen)):
        assert ours.keys() == wanted.keys()
        assert all(np.array_equal(ours[task], wanted[task]) for task in wanted)


def test_tables_have_means_and_paired_differences() -> None:
    glyphs = {"tasks": ["embedded-glyphs"]}
    results = [line("mulki", seed, 0.9, order="I") | {"uses": ["words"]} for seed in (0, 1, 2)]
    results += [line("finetune", seed, 0.4, order="I") for seed in (0, 1, 2)]
    results += [line("zero_shot", 0, 0.5, order="I")]
    results += [line(m, s, 0.6, **glyphs) for m in ("mulki", "lwf") for s in (0, 1)]
    text = compare.comparison_table(results)
    uses, mean, *_, cil, _, count = rows(text, "embedded", "I", "mulki")[0]
    assert uses == "words"
    lasts = [r["transfer"] for r in results[:3]]
    half = 4.302653 * np.std(lasts, ddof=1) / np.sqrt(3)
    assert mean == f"{np.mean(lasts):.2f} ± {half:.2f}" and (cil, count) == ("10.00 ± 0.00", "3")
    for method in ("finetune", "zero_shot"):
        # The one run without training is paired with every seed.
        (row,) = rows(text, method, "embedded", "I")
        assert row[-2:] == ["seeds and images", "3"]
        value, low, high = (float(x.strip("[],")) for x in row[0].split())
        assert 0 < low < value < high < 100
    # The two are right on the same images.
    (row,) = rows(text, "lwf", "embedded-glyphs", "I")
    assert row == ["+0.00 [+0.00, +0.00]"] * 6 + ["seeds and images", "2"]
    assert not rows(text, "lwf", "embedded", "I")


def test_lines_without_answers_have_intervals_over_seeds() -> None:
    results = [
        line(m, seed, share, kept=False, order="II")
        for m, share in (("mulki", 0.9), ("lwf", 0.5))
        for seed in (0, 1)
    ]
    text = compare.comparison_table(results)
    (row,) = rows(text, "lwf", "embedded", "II")
    assert row[-2:] == ["seeds", "2"] and row[4:6] == ["-", "-"]
    gains = [results[i]["last"] - results[i + 2]["last"] for i in (0, 1)]
    half = 12.7062 * np.std(gains, ddof=1) / np.sqrt(2)
    assert [float(x.strip("[],")) for x in row[2].split()] == pytest.approx(
        [np.mean(gains), np.mean(gains) - half, np.mean(gains) + half], abs=0.01
    )
    assert rows(text, "embedded", "II", "lwf")[0][5:] == ["-", "-", "2"]


def test_the_ablation_is_less_the_whole_method() -> None:
    name = next(iter(studies.MULKI_STAGES))
    whole = [line("mulki", seed, 0.9, variant=studies.ABLATED, order="I") for seed in (0, 1)]
    changed = [line("mulki", 1, 0.6, variant=name, order="I")]
    text = compare.ablation_table(whole, changed)
    ((transfer, *_, over, pairs),) = rows(text, name, "embedded", "I")
    assert (over, pairs) == ("images", "1")
    assert float(transfer.split()[0]) == pytest.approx(
        changed[0]["transfer"] - whole[1]["transfer"], abs=0.006
    )


def test_a_line_of_results_keeps_the_answers(start_model: dict[str, str]) -> None:
    options = {"method": "zero_shot", "tasks": ("embedded-glyphs",), "limit_images": 20}
    run = studies.Run("compare", "zero_shot", options | start_model | {"seed": 0})
    result = json.loads(json.dumps(compare.one_run(run, "pack", 1)))
    kept = unpack(result["answers"])
    assert list(kept.sizes) == result["tasks"]
    a = np.array([own.mean(axis=1) for own in kept.own.values()]).T * 100
    assert a == pytest.approx(np.array(result["matrix"]), abs=1e-3)
    last = np.concatenate([seen[-1] for seen in kept.seen.values()])
    assert result["cil_last"] == pytest.approx(100 * last.mean(), abs=1e-3)


def test_a_result_stands_while_its_settings_are_those_of_today(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = next(r for r in studies.comparison() if r.variant == "lwf")
    made = {
        "pack": compare.fingerprint(), "study": run.study, "variant": run.variant,
        "options": run.options, "settings": compare.settings_of(run),
    }  # fmt: skip
    tuned = made | {"study": "tune", "settings": made["settings"] | {"lr": 1.0}}
    older = made | {"settings": {k: v for k, v in made["settings"].items() if k != "wd"}}
    others = [
        made | {"pack": "other"},
        made | {"settings": made["settings"] | {"lr": 1.0}},
        made | {"settings": older["settings"] | {"wd": 1.0}},
        made | {"variant": "a row of earlier times"},
    ]
    assert compare.standing([made, tuned, older, *others]) == [made, tuned, older]
    monkeypatch.setitem(presets.METHODS, (BUNDLED, "lwf"), {"lr": 0.5})
    assert compare.standing([made, tuned]) == [tuned]


def test_the_running_mean_of_a_short_task_has_members_near_its_end() -> None:
    with_mean = [s for s in map(compare.settings_of, studies.comparison()) if s.get("we_every")]
    assert {settings["method"] for settings in with_mean} == {"mulki", "zscl"}
    for settings in with_mean:
        members, rest = divmod(settings["iterations"], settings["we_every"])
        assert members >= 6 and rest <= settings["we_every"] // 2


def test_studies_follow_their_rules() -> None:
    for method, grid in studies.GRIDS.items():
        runs = studies.tuning(method)
        assert len({tuple(point.items()) for point in grid}) == 12
        assert len(runs) == 24 and {run.options["seed"] for run in runs} == {100, 101}
    reported = {run.options["seed"] for run in studies.comparison()}
    assert reported == set(studies.SEEDS) and not reported & set(studies.TUNING_SEEDS)
    made = (
        *(*studies.forms(), *studies.strengths("mulki"), *runs),
        *(*studies.smoothing("snd"), *studies.held(), *studies.changes()),
    )
    assert {run.study for run in made} == set(studies.CHOICES)
    assert not set(studies.FORM_ORDERS) & {order for _, order in studies.SCENES}
    seeds = {
        name: {r.options["seed"] for r in studies.comparison() if r.variant == name}
        for name in studies.ROWS
    }
    assert all(len(of) == 5 for name, of in seeds.items() if name in studies.MAIN_ROWS)
    assert len(seeds["wise_ft"]) == 3 and len(seeds["zero_shot"]) == 1


def test_the_best_point_is_first_and_bold() -> None:
    def run(variant: str, value: float, seed: int) -> dict[str, Any]:
        metrics = dict.fromkeys(("transfer", "average", "last", "forgetting"), value)
        return {"variant": variant, "options": {"method": "lwf", "seed": seed}, **metrics}

    results = [run("lwf a", 10, 100), run("lwf a", 30, 101), run("lwf b", 25, 100)]
    table = compare.tuning_table(results).splitlines()
    assert table[-2].startswith("| lwf b **best** | 25.00 |")
    assert table[-1].startswith("| lwf a | 20.00 |") and table[-1].endswith("| 2 |")


def test_curves_of_a_run() -> None:
    result = {"matrix": [[50, 30, 40], [60, 70, 20], [80, 90, 100]], "zero_shot": [10, 20, 30]}
    found = figures.curves(result)
    assert found == {"learned": [50, 65, 90], "later": [10, -10]}


def test_figures_are_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    results = [
        line(method, seed, 0.5, order=order)
        | {"matrix": np.eye(3).tolist(), "zero_shot": [0, 0, 0]}
        for method in ("mulki", "lwf")
        for order in ("I", "II")
        for seed in (0, 1)
    ]
    scenes = compare.drawn_runs(results)
    assert [len(runs["lwf"]) for runs in scenes.values()] == [2, 2]
    svg, png = figures.draw(scenes, tmp_path)
    first = svg.read_bytes()
    assert first.startswith(b"<?xml") and b"embedded, order II" in first
    assert png.read_bytes().startswith(b"\x89PNG")
    figures.draw(scenes, tmp_path)
    assert svg.read_bytes() == first


def test_without_runs_there_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^figures: "):
        figures.draw(compare.drawn_runs([]), tmp_path)
    assert not list(tmp_path.iterdir())
