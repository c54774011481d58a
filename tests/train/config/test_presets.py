"""Presets: what they hold, and when a run takes them."""

from __future__ import annotations

from dataclasses import fields

import pytest

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
