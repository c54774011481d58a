from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from mulki.clip import models
from mulki.errors import InputError
from mulki.train.config.run_config import RunConfig, resolve
from mulki.train.saving.checkpoints import load_checkpoint
from mulki.train.start.start_model import (
    check_start,
    is_checkpoint,
    load_start,
    warn_of_what_is_left_behind,
)
from tests.train.run_helpers import Run
from tests.train_helpers import same_state, state_of


def test_random_weights_have_to_be_asked_for(
    run: Run, tmp_path: Path, tiny_models: Sequence[str]
) -> None:
    with pytest.raises(InputError, match="^--pretrained: got none, .*ViT-B/32 .* such as "):
        check_start(RunConfig(model="ViT-B/32"))
    with pytest.raises(InputError, match="--pretrained none if random ones are meant"):
        run(model="tiny-vit")
    assert not (tmp_path / "logs").exists()
    check_start(resolve({"model": "tiny-vit", "pretrained": "none"}).run)
    check_start(RunConfig())
    with pytest.raises(InputError, match="mulki-mini brings its own weights"):
        models.load("mulki-mini", "none")


def test_a_run_and_its_checkpoints_are_start_models(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(method="finetune")
    wanted = state_of(load_checkpoint(first.path))
    (last,) = (first.path / "checkpoints").glob("task_02*")
    for path in (first.path, first.latest, last):
        assert same_state(state_of(load_start(str(path))), wanted)
    second = run("second", model=str(first.path), method="finetune")
    assert f"{first.path} has learned colours, shades; this run takes its weights" in caplog.text
    assert f"pass --continue {first.path} for all of it" in caplog.text
    caplog.clear()
    run("same", model=str(first.path), method="zero_shot")
    given = {"original": "tiny-vit", "original_pretrained": "none"}
    run("third", model=str(first.path), method="mulki", **given)
    assert "has learned" not in caplog.text
    start = RunConfig(model=f"local-dir:{first.latest}")
    warn_of_what_is_left_behind(start)
    assert "local-dir:" in caplog.text
    assert second.matrix.zero_shot == first.matrix.rows[-1]
    with pytest.raises(InputError, match="^--pretrained: .*brings its own weights"):
        load_start(str(last), "openai")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: no open_clip_config.json")):
        load_start(str(tmp_path))


def test_names_of_models_go_before_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: Sequence[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mulki-mini", "tiny-vit"):
        (tmp_path / name).mkdir()
        assert not is_checkpoint(name) and is_checkpoint(f"./{name}")
    assert not is_checkpoint("elsewhere")
    (tmp_path / "lr:1e-4").mkdir()
    assert is_checkpoint(str(tmp_path / "lr:1e-4")) and not is_checkpoint(f"local-dir:{tmp_path}")
