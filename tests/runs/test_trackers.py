from __future__ import annotations

import logging
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mulki.errors import InputError
from mulki.runs import trackers
from mulki.runs.trackers import chosen, open_trackers
from tests.runs.tracker_files import tensorboard_curves, wandb_curves, wandb_records

Install = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Install:
    def install(*names: str) -> None:
        monkeypatch.setattr(trackers, "_installed", lambda name: name in names)

    return install


@pytest.mark.parametrize(
    ("given", "here", "wanted"),
    [
        (["auto"], [], ()),
        (["auto"], ["tensorboard", "wandb"], ("tensorboard",)),
        (["none"], ["tensorboard"], ()),
        ([], ["tensorboard"], ()),
        (["wandb,tensorboard"], ["tensorboard", "wandb"], ("tensorboard", "wandb")),
        (["wandb", "tensorboard"], ["tensorboard", "wandb"], ("tensorboard", "wandb")),
        (["wandb", "auto"], ["tensorboard", "wandb"], ("wandb", "tensorboard")),
        (["all"], ["tensorboard", "wandb"], ("tensorboard", "wandb")),
    ],
)
def test_trackers_are_chosen(
    installed: Install, given: list[str], here: list[str], wanted: tuple[str, ...]
) -> None:
    installed(*here)
    assert chosen(given) == wanted


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["wandbb"], "--report-to: got 'wandbb' .did you mean \"wandb\""),
        (["none", "wandb"], "--report-to: got none beside none wandb"),
        (["all"], "the package wandb is not installed; pip install wandb"),
        (["wandb"], "pip install wandb"),
    ],
)
def test_what_cannot_be_chosen(installed: Install, given: list[str], says: str) -> None:
    installed("tensorboard")
    with pytest.raises(InputError, match=says):
        chosen(given)


@pytest.fixture
def without_settings_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ERROR_REPORTING"):
        # What a tracker sets goes again, too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_wandb_is_offline_and_writes_into_the_run_folder(
    monkeypatch: pytest.MonkeyPatch,
    installed: Install,
    tmp_path: Path,
    without_settings_of_wandb: None,
) -> None:
    calls: list[tuple[str, Any]] = []

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append(("axis", (name, step_metric)))

        def log(self, values: dict[str, float]) -> None:
            calls.append(("log", values))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**given: Any) -> Run:
        calls.append(("init", given))
        return Run()

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    fake.Settings = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    installed("wandb")
    (tracker,) = open_trackers(["wandb"], tmp_path, "first", {"lr": 1})
    tracker.add({"train/loss": 0.5}, 7, "step")
    tracker.add({"metrics/last": 80.0}, 2, "tasks")
    tracker.close()
    given = calls[0][1]
    assert (given["mode"], given["project"], given["name"]) == ("offline", "mulki", "first")
    assert given["dir"] == str(tmp_path) and given["config"] == {"lr": 1}
    assert calls[1:] == [
        ("axis", ("*", "step")),
        ("axis", ("metrics/*", "tasks")),
        ("log", {"train/loss": 0.5, "step": 7}),
        ("log", {"metrics/last": 80.0, "tasks": 2}),
        ("finish", None),
    ]
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    open_trackers(["wandb"], tmp_path, "first", {})
    assert calls[-3][1]["mode"] == "disabled"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    open_trackers(["wandb"], tmp_path, "first", {})
    assert calls[-3][1]["mode"] == "online" and "WANDB_ERROR_REPORTING" not in os.environ


@pytest.mark.parametrize(
    ("module", "error"), [(types.ModuleType("wandb"), AttributeError), (None, ModuleNotFoundError)]
)
def test_a_tracker_that_fails_does_not_fail_the_run(
    monkeypatch: pytest.MonkeyPatch,
    installed: Install,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    module: types.ModuleType | None,
    error: type[Exception],
) -> None:
    """A package without `init`, and one that is gone when a run goes on."""
    monkeypatch.setitem(sys.modules, "wandb", module)
    installed(*(["wandb"] if module else []))
    assert chosen(["wandb"], installed=False) == ("wandb",)
    with caplog.at_level(logging.WARNING):
        assert open_trackers(["wandb"], tmp_path, "first", {}) == []
    assert f"no curves for wandb ({error.__name__}" in caplog.text


@pytest.mark.parametrize("fails", ["add", "close"])
def test_a_tracker_that_fails_later_is_left_out_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    calls: list[str] = []

    class Failing:
        def __init__(self, *given: object) -> None:
            pass

        def add(self, *given: object) -> None:
            self.called("add")

        def close(self) -> None:
            self.called("close")

        def called(self, name: str) -> None:
            calls.append(name)
            if name == fails:
                raise OSError("no space left")

    monkeypatch.setitem(trackers._KINDS, "wandb", Failing)  # type: ignore[arg-type]
    (tracker,) = open_trackers(["wandb"], tmp_path, "first", {})
    with caplog.at_level(logging.WARNING):
        tracker.add({"loss": 1.0}, 1, "step")
        tracker.add({"loss": 1.0}, 2, "step")
        tracker.close()
    assert calls == (["add"] if fails == "add" else ["add", "add", "close"])
    assert [r.message for r in caplog.records] == [
        "no more curves for wandb (OSError: no space left)"
    ]


def test_tensorboard_finds_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tracker,) = open_trackers(["tensorboard"], tmp_path, "first", {})
    tracker.add({"train/loss": 0.5, "val/x-zeroshot-val-top1": 0.75}, 7, "step")
    tracker.add({"metrics/last": 80.0}, 2, "tasks")
    tracker.close()
    assert tensorboard_curves(tmp_path / "tensorboard") == {
        "train/loss": [(7, 0.5)],
        "val/x-zeroshot-val-top1": [(7, 0.75)],
        "metrics/last": [(2, 80.0)],
    }


def test_wandb_finds_the_curves_of_an_offline_run(
    tmp_path: Path, without_settings_of_wandb: None
) -> None:
    pytest.importorskip("wandb")
    (tracker,) = open_trackers(["wandb"], tmp_path, "first", {"lr": 1})
    tracker.add({"train/loss": 0.5}, 7, "step")
    tracker.add({"metrics/last": 80.0}, 2, "tasks")
    tracker.close()
    first, second = wandb_curves(tmp_path / "wandb")
    assert first.items() >= {"train/loss": 0.5, "step": 7}.items()
    assert second.items() >= {"metrics/last": 80.0, "tasks": 2}.items()
    records = wandb_records(tmp_path / "wandb")
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes["*"] == "step" and axes["metrics/*"] == "tasks"
    (run,) = {(r.run.display_name, r.run.project) for r in records if r.HasField("run")}
    assert run == ("first", "mulki")
