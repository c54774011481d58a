"""Presets: what they hold, and when a run takes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import pytest

from benchmarks.embedded import compare, studies, tables
from mulki import methods
from mulki.clip.models import BUNDLED
from mulki.errors import InputError
from mulki.train.config import presets
from mulki.train.config.rates import learning_rates
from mulki.train.config.run_config import RunConfig, resolve


def test_preset_goes_with_the_model_whatever_the_tasks() -> None:
    for tasks in (["embedded"], ["embedded:digits"], ["a_folder", "b"]):
        assert resolve({"tasks": tasks}).run.lock_text is True
    assert resolve({"model": "RN50"}).run.lock_text is False


def test_preset_of_a_method_is_stronger_than_that_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(presets.METHODS, (BUNDLED, "lwf"), {"lr": 0.5, "temperature": 3.0})
    settings = resolve({"method": "lwf"})
    assert settings.run.lr == 0.5 and settings.method.temperature == 3.0
    assert resolve({"method": "lwf", "temperature": 4}).method.temperature == 4.0
    assert resolve({"method": "zero_shot"}).run.lr == presets.MODELS[BUNDLED]["lr"]


def test_quick_preset_is_short_whatever_the_tasks() -> None:
    for tasks in (["embedded"], ["a_folder"], ["a", "b"]):
        config = resolve({"tasks": tasks, "preset": "quick"}).run
        assert config.iterations == 5 and config.limit_images == 120
    assert resolve({"preset": "quick", "limit_images": "none"}).run.limit_images is None


def test_presets_hold_options_that_exist() -> None:
    names = {f.name for f in fields(RunConfig)}
    for options in (*presets.MODELS.values(), presets.QUICK):
        assert options.keys() <= names
    for method, options in presets.RECIPES.values():
        own = {f.name for f in fields(methods.get(method).Options)}
        assert (presets.MTIL | options).keys() <= names | own
    for (model, method), options in presets.METHODS.items():
        own = {f.name for f in fields(methods.get(method).Options)}
        assert model in presets.MODELS and options.keys() <= names | own


@pytest.mark.parametrize("method", studies.GRIDS)
def test_preset_of_a_method_is_the_best_point_of_its_grid_at_its_best_strength(method: str) -> None:
    results = compare.read_results()
    points = by_variant(
        r for r in results if r["study"] == "tune" and r["options"]["method"] == method
    )
    seeds = len(studies.TUNING_SEEDS)
    assert all(len(points[run.variant]) == seeds for run in studies.tuning(method))
    # A grid that was moved on has further points.
    best = max(points.values(), key=tables.criterion)
    if method in studies.TUNED:
        assert chosen_in(best).items() == studies.TUNED[method].items()
        points = by_variant(
            r for r in results if r["study"] == "strength" and r["options"]["method"] == method
        )
        assert points.keys() == {run.variant for run in studies.strengths(method)}
        assert all(len(runs) == len(studies.FORM_ORDERS) for runs in points.values())
        best = max(points.values(), key=tables.criterion)
    chosen = {name: value for name, value in chosen_in(best).items() if name != "order"}
    preset = presets.METHODS[BUNDLED, method] | studies.BEFORE_AGAIN.get(method, {})
    assert preset.items() >= chosen.items()


def test_a_point_of_another_study_takes_the_place_of_a_preset_by_its_rule_alone() -> None:
    results = compare.read_results()
    points = by_variant(r for r in results if r["study"] == "again")
    compared = {}
    for row in studies.AGAIN:
        before = tables.criterion(
            r for r in results if (r["study"], r["variant"]) == studies.before_again(row)
        )
        for variant, runs in points.items():
            if variant.rpartition(", ")[0] == row and len(runs) == len(studies.FORM_ORDERS):
                compared[variant] = tables.criterion(runs) - before
    clear = [variant for variant, more in compared.items() if more > 0.67]
    assert len(compared) == 34 and clear == ["snd, lr=0.0001", "finetune, lr=5e-05"]
    assert presets.METHODS[BUNDLED, "snd"]["lr"] == 1e-4
    assert presets.METHODS[BUNDLED, "finetune"]["lr"] == 5e-5


@pytest.mark.parametrize("row", studies.FORMS)
def test_a_row_of_mulki_is_the_form_that_it_is_said_to_be(row: str) -> None:
    form, of_row = (
        compare.settings_of(studies.Run("held", row, options))
        for options in (studies.HELD[studies.FORMS[row]], studies.ROWS[row])
    )
    assert form == of_row


def by_variant(runs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["variant"], []).append(run)
    return found


def chosen_in(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The options of a point that the study chose."""
    options = runs[0]["options"]
    given = ("tasks", "seed", "method", "label_smoothing", *studies.METHODS[options["method"]])
    return {name: value for name, value in options.items() if name not in given}


def test_small_preset_has_as_many_steps() -> None:
    small, default = (resolve({"preset": name}).run for name in ("small", "default"))
    assert small.batch_size == default.batch_size // 2
    assert (small.iterations, small.lr) == (default.iterations, default.lr)


def test_the_recipe_of_zscl() -> None:
    settings = resolve({"preset": "zscl"})
    run, zscl = settings.run, settings.method
    assert (run.method, run.tasks, run.order) == ("zscl", ("mtil",), "I")
    assert (run.model, run.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert (run.iterations, run.batch_size, run.warmup, run.wd) == (1000, 64, 100, 0.0)
    assert (run.lr_scheduler, run.augment, run.opt) == ("cosine", "crop", "adamw")
    assert run.lr == 1e-5
    assert learning_rates(run.lr_of) == {"aircraft": 5e-5, "mnist": 5e-5}
    assert (zscl.label_smoothing, zscl.l2, zscl.we_every, zscl.temperature) == (0.2, 1, 100, 2)
    assert not run.lock_text


def test_the_recipe_with_mulki_and_with_other_methods() -> None:
    settings = resolve({"preset": "mulki-mtil"})
    run, mulki = settings.run, settings.method
    assert (run.method, run.warmup, mulki.we_every) == ("mulki", 100, 100)
    assert (mulki.label_smoothing, mulki.gate, mulki.hold_on) == (0.2, "label", "task")
    relations = ("image_text", "image_image", "text_image", "text_text", "image_anchor")
    assert {getattr(mulki, name) for name in relations} == {0.25}
    assert (mulki.feature, mulki.feature_original) == (1.0, None)
    assert not methods.get("mulki")(mulki).needs.reference
    other = resolve({"preset": "zscl", "method": "lwf", "lr": 2e-5})
    assert (other.run.method, other.run.lr, other.run.warmup) == ("lwf", 2e-5, 100)
    assert resolve({"preset": "mulki-mtil", "method": "zscl"}).method.label_smoothing == 0.2


def test_a_recipe_leaves_the_weights_of_another_model_alone() -> None:
    run = resolve({"preset": "zscl", "model": "RN50"}).run
    assert (run.model, run.pretrained, run.warmup) == ("RN50", None, 100)
    bundled = resolve({"preset": "zscl", "model": BUNDLED}).run
    assert bundled.lock_text and bundled.lr == 1e-5


def test_a_resolved_recipe_is_resolved_to_itself() -> None:
    settings = resolve({"preset": "mulki-mtil"})
    assert resolve(settings.to_dict()) == settings


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(InputError, match='^--preset: .*"zscl"'):
        resolve({"preset": "zsclx"})
