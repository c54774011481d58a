"""The comparison on the bundled tasks: its runs, what is kept of one, its tables and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.embedded import compare, figures, studies, tables
from mulki.clip.models import BUNDLED
from mulki.errors import InputError
from mulki.train.config import presets
from tests import ROOT, train_helpers

# What the docs call the rows of the comparison.
CALLED = {
    "zero-shot": "zero_shot",
    "fine-tuning": "finetune",
    "WiSE-FT": "wise_ft",
    "EWC": "ewc",
    "replay of 500 images": "er",
    "LwF": "lwf",
    "LwF-VR": "lwf_vr",
    "ZSCL": "zscl",
    "ZSCL, made images": "zscl, made images",
    "Select-and-Distill": "snd",
    "Select-and-Distill, made images": "snd, made images",
    "the same, half the rate": "snd, made images, half the rate",
    "KeepLoRA": "keeplora",
    "MulKI": "mulki",
    "MulKI, adapters": "mulki, adapters",
}

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model


def line(variant: str, order: str, seed: int = 0, last: float = 50.0) -> dict[str, Any]:
    return {
        "study": "compare",
        "variant": variant,
        "options": {"method": variant, "order": order, "seed": seed},
        "uses": [],
        "transfer": 30.0,
        "zero_shot_transfer": 30.5,
        "average": 50.0,
        "last": last,
        "forgetting": 1.0,
        "cil_average": 45.0,
        "cil_last": 40.0,
        "head_last": last + 1,
        "head_cil_last": 45.0,
    }


def rows(text: str) -> dict[str, list[str]]:
    cells = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    return {first: others for first, *others in cells}


def test_the_unit_of_the_table_is_an_order() -> None:
    lines = [
        *(line("mulki", "I", seed, 80.0 + seed) | {"uses": ["words"]} for seed in (0, 1, 2)),  # 81
        line("mulki", "II", last=77.0),
        line("lwf", "I", last=78.0),  # 2 less than with the same seed
        line("lwf", "II", last=77.0),  # equal
        line("lwf", "III", last=10.0),  # of no pair
    ]
    found = rows(tables.table(lines, tables.OF_ORDERS))
    place = 1 + list(tables.OF_ORDERS).index("last")
    # Student's t of one degree of freedom: 12.706 times half of the distance of two values.
    assert found["mulki"][place] == "79.00 ± 25.41"
    assert (found["mulki"][0], found["mulki"][-1]) == ("words", "4")
    assert found["mulki less lwf"][place] == "+1.00 ± 12.71"
    assert (found["lwf"][0], found["lwf"][1]) == ("-", "-0.50 ± 0.00")
    assert list(found) == ["method", "---", "lwf", "mulki", "mulki less lwf"]


def test_one_order_has_no_interval_and_no_pair_no_difference() -> None:
    found = rows(tables.table([line("mulki", "I", last=80.0), line("lwf", "II")], tables.OF_ORDERS))
    assert found["mulki"][1:] == "-0.50 30.00 50.00 80.00 1.00 40.00 81.00 45.00 1".split()
    assert set(found["mulki less lwf"][1:-1]) == {"-"}


def test_a_method_without_a_head_has_no_figures_of_one() -> None:
    alone = [
        {k: v for k, v in line("zero_shot", order).items() if not k.startswith("head")}
        for order in ("I", "II")
    ]
    both = [line("mulki", "I"), line("mulki", "II")]
    found = rows(tables.table([*alone, *both], tables.OF_ORDERS))
    assert found["zero_shot"][-3:] == ["-", "-", "2"]
    assert found["mulki less zero_shot"][-2:] == ["-", "-"]


def test_the_table_by_order_says_where_a_run_is_missing() -> None:
    text = tables.by_order([line("mulki", "II"), line("mulki", "I"), line("lwf", "I", last=70.0)])
    assert rows(text)["lwf"] == ["30.0 / 50.0 / 70.0", "-"]
    assert rows(text)["method"] == ["I", "II"]


def test_the_page_has_every_part_that_has_runs() -> None:
    of_run = {"cpu": "CPU", "torch": "2.13", "commit": "a" * 40, "settings": {"precision": "fp32"}}
    of_glyphs = line("mulki", "I")
    of_glyphs["options"] = {"method": "mulki", "tasks": ["embedded-glyphs"], "seed": 0}
    held = line("mulki", "III") | {"study": "held", "variant": "a form"}
    lines = [r | of_run for r in (line("mulki", "I"), line("mulki", "IV"), of_glyphs, held)]
    text = tables.page(lines)
    headings = [row for row in text.splitlines() if row.startswith("#")]
    assert headings == [
        "# Results on the bundled tasks",
        "## Six orders",
        "## embedded-glyphs",
        "## Forms of MulKI",
    ]
    assert "CPU, torch 2.13, fp32; commits aaaaaaaaaaaa." in text
    counts = [r.rsplit("| ", 1)[1] for r in text.splitlines() if r.startswith("| mulki | - |")]
    # In all orders, in those besides III and IV, and in glyphs.
    assert counts == ["2 |", "1 |", "1 |"]


def test_the_best_point_of_a_method_is_first_and_bold() -> None:
    def run(variant: str, value: float, seed: int) -> dict[str, Any]:
        metrics = dict.fromkeys(("transfer", "average", "last", "forgetting"), value)
        return {"variant": variant, "options": {"method": "lwf", "seed": seed}, **metrics}

    results = [run("lwf a", 10, 100), run("lwf a", 30, 101)]
    results += [run("lwf b", 25, 100), run("lwf b", 25, 101), run("lwf c", 40, 100)]
    best, other, fewer = tables.choices("tune", results).splitlines()[-3:]
    assert best.startswith("| lwf b **best** | 25.00 |")
    assert other.startswith("| lwf a | 20.00 |") and other.endswith("| 2 |")
    # A row that has not run where others have does not compete.
    assert fewer.startswith("| lwf c | 40.00 |") and fewer.endswith("| 1 |")


def test_rates_once_more_stand_beside_the_preset_that_the_smoothing_has_run() -> None:
    of_run = {"cpu": "CPU", "torch": "2.13", "commit": "a" * 40, "settings": {"precision": "fp32"}}
    lines = [
        line("snd", "III", last=last) | of_run | {"study": study, "variant": variant}
        for study, variant, last in (
            ("again", "snd, made images, lr=0.0004", 60.0),
            ("smoothing", "snd label_smoothing=0, made images", 70.0),
            ("smoothing", "snd label_smoothing=0.1, made images", 80.0),
            ("smoothing", "snd label_smoothing=0", 90.0),
        )
    ]
    names = list(rows(tables.page(lines).split("## Rates and strengths once more")[1]))
    assert names[:3] == ["variant", "---", "snd, made images, preset"]
    assert names[3:5] == ["snd, made images, lr=0.0004", "snd, preset"]


def test_a_run_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_run(run: studies.Run, pack: str, threads: int) -> dict[str, Any]:
        if run.variant == "finetune":
            raise InputError("lower --lr")
        found = line(run.variant, run.options["order"])
        return found | {"study": run.study, "pack": pack, "settings": compare.settings_of(run)}

    monkeypatch.setattr(compare, "one_run", one_run)
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda *of, **_: ThreadPoolExecutor(1))
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    runs = [run for run in studies.comparison((0,)) if run.options.get("order") == "I"][:3]
    assert [run.variant for run in runs] == ["zero_shot", "finetune", "wise_ft"]
    with pytest.raises(RuntimeError, match="finetune.*lower --lr"):
        compare.carry_out(runs, 1)
    rows = [json.loads(text) for text in (tmp_path / "compare.jsonl").open()]
    assert {row["variant"] for row in rows} == {"zero_shot", "wise_ft"}
    capsys.readouterr()
    with pytest.raises(RuntimeError, match="finetune"):
        compare.carry_out(runs, 1)
    assert "3 runs, 1 to do" in capsys.readouterr().out


def test_each_row_of_the_transformer_has_its_own_best_rate() -> None:
    metrics = ("transfer", "average", "last", "forgetting")
    found = tables.choices(
        "vit_rates",
        [
            {"variant": f"{row}, {share} of its rate", "options": {"method": "mulki"}}
            | dict.fromkeys(metrics, value)
            for row, share, value in (
                *(("a", 1, 5.0), ("a", 2, 4.0), ("a, b", 1, 9.0), ("a, b", 2, 8.0)),
                ("alone", 1, 3.0),
            )
        ],
    )
    best = [line.split("|")[1].strip() for line in found.splitlines() if "**best**" in line]
    assert best == ["a, 1 of its rate **best**", "a, b, 1 of its rate **best**"]


def test_a_line_of_results_has_what_the_tables_show(start_model: dict[str, str]) -> None:
    options = {"method": "finetune", "tasks": ("embedded-glyphs",), "limit_images": 20}
    quick = {"iterations": 1, "batch_size": 4, "seed": 0}
    run = studies.Run("compare", "finetune", options | quick, start_model["model"])
    result = json.loads(json.dumps(compare.one_run(run, compare.fingerprint(run.model), 1)))
    found = rows(tables.table([result], tables.OF_SEQUENCES))["finetune"]
    assert float(found[3]) == pytest.approx(np.mean(result["matrix"][-1]), abs=0.006)
    assert len(result["zero_shot"]) == len(result["tasks"])
    assert result["settings"] == compare.settings_of(run)


def test_a_result_stands_while_its_settings_are_those_of_today(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = next(r for r in studies.comparison() if r.variant == "lwf")
    made = {
        "pack": compare.fingerprint(), "study": run.study, "variant": run.variant,
        "options": run.options, "settings": compare.settings_of(run),
    }  # fmt: skip
    tuned = made | {"study": "tune", "settings": made["settings"] | {"lr": 1.0}}
    older = made | {"options": made["options"] | {"seed": 1}}
    older["settings"] = {k: v for k, v in made["settings"].items() if k != "wd"} | {"seed": 1}
    others = [
        made | {"pack": "other"},
        made | {"settings": made["settings"] | {"lr": 1.0}},
        made | {"settings": older["settings"] | {"wd": 1.0}},
        made | {"variant": "a row of earlier times"},
    ]
    assert compare.standing([made, tuned, older, *others]) == [made, tuned, older]
    again = made | {"seconds": 1.0}
    assert compare.standing([made, tuned, again]) == [again, tuned]
    monkeypatch.setitem(presets.METHODS, (BUNDLED, "lwf"), {"lr": 0.5})
    assert compare.standing([made, tuned]) == [tuned]


def test_the_page_of_results_is_that_of_the_lines() -> None:
    page = tables.page(compare.standing(compare.read_results()))
    assert compare.TABLES.read_text(encoding="utf-8") == page


def test_the_docs_show_the_figures_of_the_lines() -> None:
    """The tables of the six orders and of the sequences in the docs, and the README's."""
    lines = [r for r in compare.standing(compare.read_results()) if r["study"] == "compare"]
    method, more = (
        (ROOT / "docs" / page).read_text(encoding="utf-8")
        for page in ("method.md", "more-results.md")
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    def measured(places: Sequence[str], columns: dict[str, Any]) -> dict[str, list[str]]:
        of = [r for r in lines if tables.place_of(r["options"]) in places]
        found = rows(tables.table(of, columns))
        return {name: cells[1 : 1 + len(columns)] for name, cells in found.items()}

    def shown(page: str, after: str, before: str) -> dict[str, list[str]]:
        part = page.partition(after)[2].partition(before)[0]
        return {CALLED[name]: cells for name, cells in rows(part).items() if name in CALLED}

    def agree(cells: dict[str, list[str]], found: dict[str, list[str]]) -> None:
        assert set(cells) == set(found) & set(studies.ROWS)
        for name, of in cells.items():
            values = [float(cell.split()[0]) for cell in found[name]]
            # Both are rounded.
            assert [float(cell) for cell in of] == pytest.approx(values, abs=0.0551), name

    columns = {name: of for name, of in tables.OF_ORDERS.items() if name != "transfer"}
    found = measured(studies.ORDERS, columns)
    means = shown(method, "### Six tasks", "| MulKI less ")
    agree({name: cells[1:] for name, cells in means.items()}, found)
    less = shown(method, "| MulKI less ", "### What each part")
    assert less
    for name, cells in less.items():
        assert cells == found[f"mulki less {name}"], name
    for name in ("zero_shot", "finetune", "mulki"):
        kept, _, *accuracies = means[name][1:]
        figures_of = accuracies[0], accuracies[2], accuracies[4]
        assert all(f" {value} %" in readme for value in figures_of), name
        assert name == "zero_shot" or f" {kept.lstrip('-')} points" in readme
    columns = {name: of for name, of in tables.OF_SEQUENCES.items() if name.startswith("cil")}
    agree(shown(more, "Flags, which", "Glyphs ("), measured(["embedded-flags"], columns))
    agree(shown(more, "Glyphs (", "## On a transformer"), measured(["embedded-glyphs"], columns))


def test_the_running_mean_of_a_short_task_has_members_near_its_end() -> None:
    runs = map(compare.settings_of, studies.comparison((0,)))
    with_mean = [settings for settings in runs if settings.get("we_every")]
    assert {settings["method"] for settings in with_mean} == {"zscl"}
    for settings in with_mean:
        members, rest = divmod(settings["iterations"], settings["we_every"])
        assert members >= 6 and rest <= settings["we_every"] // 2


def test_every_row_runs_in_every_place_one_seed_after_the_other() -> None:
    runs = studies.comparison()
    places = {tables.place_of(run.options) for run in runs}
    assert places == {*studies.ORDERS, *studies.SEQUENCES} and len(studies.ORDERS) == 6
    assert len(runs) == 8 * 3 * len(studies.ROWS)
    seeds = [run.options["seed"] for run in runs]
    assert seeds == sorted(seeds) and not set(seeds) & set(studies.TUNING_SEEDS)
    made = [run for run in runs if run.variant.endswith("made images")]
    assert {run.options["reference"] for run in made} == {"made"}
    assert set(studies.DRAWN_ROWS) <= set(studies.ROWS)


def test_studies_follow_their_rules() -> None:
    for method, grid in studies.GRIDS.items():
        runs = studies.tuning(method)
        assert len({tuple(point.items()) for point in grid}) == 12
        assert len(runs) == 24 and {run.options["seed"] for run in runs} == {100, 101}
    chosen_on_two = (
        *(*studies.strengths("lwf"), *studies.smoothing("snd"), *studies.held()),
        *studies.again(),
        *studies.changes(),
    )
    # The study came before the preset of today.
    assert {run.options["lr"] for run in studies.smoothing("snd")} == {2e-4}
    model = "local-dir:models/vit"
    of_vit = [*studies.vit_rates(model), *studies.vit_stages(model)]
    assert all(run.options["tasks"] == studies.TUNING_TASKS for run in of_vit)
    assert {run.study for run in (*chosen_on_two, *runs, *of_vit)} == set(studies.CHOICES)
    assert {run.options["order"] for run in chosen_on_two} == set(studies.FORM_ORDERS)
    assert {run.options["seed"] for run in chosen_on_two} == {100}


def test_the_transformer_has_what_the_bundled_model_has_but_its_rates(tmp_path: Path) -> None:
    model = tmp_path / "some-vit"
    preset = {"lr": 2e-4, "iterations": 64}
    for run in studies.vit(f"local-dir:{model}", (0,)):
        settings = compare.settings_of(run)
        assert settings["model"] == "some-vit" and str(tmp_path) not in json.dumps(settings)
        assert (settings["iterations"], settings["batch_size"]) == (32, 32)
        if run.variant == "mulki":
            bundled = compare.settings_of(studies.Run("compare", "mulki", run.options | preset))
            assert {k for k in bundled if bundled[k] != settings[k]} == {"model", *preset}
    rates = [run.options["lr"] for run in studies.vit_rates("m") if run.variant[:5] == "mulki"]
    assert rates[:3] == [6e-6, 2e-5, 6e-5]
    unchanged, *changed = studies.vit_stages("m")[: len(studies.VIT_STAGES)]
    of_table = next(run for run in studies.vit("m") if run.variant == "mulki")
    elsewhere = {"tasks", "seed", "order"}
    shared = unchanged.options.keys() - elsewhere
    assert all(unchanged.options[name] == of_table.options[name] for name in shared)
    settings = compare.settings_of(unchanged)
    assert all(compare.settings_of(run) != settings for run in changed)


def test_results_of_two_start_models_stand_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "open_clip_model.safetensors").write_bytes(b"weights")
    model = f"local-dir:{tmp_path / 'vit'}"
    pack = compare.fingerprint(model)
    assert pack != compare.fingerprint()
    runs = studies.vit(model, (0,))
    lines = [
        line(run.variant, run.options["order"])
        | {"study": "vit", "pack": pack, "settings": compare.settings_of(run)}
        for run in runs
    ]
    old = lines[0] | {"pack": "of other weights"}
    changed = lines[1] | {"settings": lines[1]["settings"] | {"lr": 1.0}}
    rate = old | {"study": "vit_rates"}
    older_rate = rate | {"pack": "of yet others"}
    assert compare.standing([old, changed, older_rate, rate, *lines]) == [rate, *lines]


def test_mulki_is_its_best_form() -> None:
    """The preset of MulKI has the settings of the best row of `held`, by what is committed."""
    held = [r for r in compare.read_results() if r["study"] == "held"]
    runs = {run.variant: compare.settings_of(run) for run in studies.held()}
    complete = {
        name: of
        for name in runs
        if len(of := [r for r in held if r["variant"] == name]) == len(studies.FORM_ORDERS)
    }
    best = max(complete, key=lambda name: tables.criterion(complete[name]))
    (preset,) = (
        compare.settings_of(run)
        for run in studies.comparison((studies.TUNING_SEEDS[0],))
        if run.variant == "mulki" and run.options.get("order") == runs[best]["order"]
    )
    assert preset == runs[best]


def test_curves_of_a_run() -> None:
    result = {"matrix": [[50, 30, 40], [60, 70, 20], [80, 90, 100]], "zero_shot": [10, 20, 30]}
    found = figures.curves(result)
    assert found == {"learned": [50, 65, 90], "later": [10, -10]}


def test_figures_are_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    results = [
        line(method, order) | {"matrix": np.eye(3).tolist(), "zero_shot": [0, 0, 0]}
        for method in ("mulki", "lwf")
        for order in ("I", "II")
    ]
    svg, png = figures.draw(results, tmp_path)
    first = svg.read_bytes()
    assert first.startswith(b"<?xml") and b"lwf" in first and b"finetune" not in first
    assert png.read_bytes().startswith(b"\x89PNG")
    figures.draw(results, tmp_path)
    assert svg.read_bytes() == first


def test_without_runs_there_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^figures: "):
        figures.draw([line("mulki", "I") | {"study": "held"}], tmp_path)
    assert not list(tmp_path.iterdir())
