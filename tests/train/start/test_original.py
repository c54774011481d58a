from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mulki.errors import InputError
from mulki.methods import PREVIOUS, ZERO_SHOT
from mulki.train import sequence
from mulki.train.config.run_config import RunConfig, resolve
from mulki.train.display.outline import plan
from mulki.train.learning.inputs import Listeners
from mulki.train.saving.checkpoints import CONFIG_NAME
from mulki.train.start.original import load_original
from mulki.train.start.setup import prepared
from mulki.train.start.start_model import load_start
from mulki.train.task_learner import TaskLearner
from tests.train.run_helpers import SHORT, Run, weights
from tests.train_helpers import same_state, state_of


def hashes_of(folder: Path) -> dict[str, Any]:
    hashes: dict[str, Any] = json.loads((folder / "env.json").read_text())["hashes"]
    return hashes


def test_a_run_that_goes_on_from_a_checkpoint_has_the_first_runs_original(
    run: Run, start_model: dict[str, str], task_folders: tuple[str, str], tmp_path: Path
) -> None:
    first = run("first", tasks=task_folders[:1])
    given = {
        **SHORT,
        "tasks": task_folders[1:],
        "model": f"local-dir:{first.path / 'checkpoints' / 'latest'}",
        "original": start_model["model"],
        "logs": str(tmp_path / "logs"),
        "name": "second",
    }
    with prepared(resolve(given), write=False) as setup:
        assert any(line == f"original {start_model['model']}" for line in plan(setup))
        learner, start = TaskLearner(setup), state_of(setup.model)
        learner.learn(0, setup.tasks[0], Listeners())
        original, previous = learner.frozen[ZERO_SHOT], learner.frozen[PREVIOUS]
        assert not any(p.requires_grad for p in original.clip.parameters())
        # The previous model of its first task is the one that it goes on from.
        assert same_state(state_of(previous), start)
        assert not same_state(state_of(original), start)
    second = sequence.run(resolve(given))
    assert second is not None
    assert hashes_of(second.path)["original"] == hashes_of(first.path)["weights"]


IMAGE_TOWER = "visual.transformer.resblocks.0.mlp.c_fc"


@pytest.mark.parametrize("targets", [(), (IMAGE_TOWER,)])
def test_an_original_beside_adapters(
    run: Run, start_model: dict[str, str], targets: tuple[str, ...]
) -> None:
    adapted = {"method": "mulki", "lora_rank": 2, "lora_targets": targets, "anchors": "both"}
    plain = run("plain", **adapted)
    named = run("named", original=start_model["model"], **adapted)
    found, wanted = weights(named), weights(plain)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-5)


def test_an_original_that_is_the_start_model_changes_nothing(
    run: Run, start_model: dict[str, str]
) -> None:
    plain = run("plain", method="mulki")
    named = run("named", method="mulki", original=start_model["model"])
    found, wanted = weights(named), weights(plain)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-5)
    assert "original" not in hashes_of(plain.path)
    assert hashes_of(named.path)["original"] == hashes_of(plain.path)["weights"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"original": "tiny-vit", "lora_rank": 2, "lora_targets": (IMAGE_TOWER,)},
            "--lora-targets in the text tower too",
        ),
        ({"original": "tiny-resnet"}, "--original: tiny-resnet has another architecture than"),
        ({"original": "tiny-vitt"}, "--original: no model 'tiny-vitt' (did you mean"),
        ({"original": "local-dir:gone"}, "--original local-dir:gone --original-pretrained None: "),
        ({"original_pretrained": "openai"}, "--original-pretrained: got openai without a model"),
        ({"original": "tiny-vit", "original_pretrained": "gone.pt"},
         "--original-pretrained: no file gone.pt"),
        ({"original": "tiny-vit", "method": "finetune"},
         "--original: got tiny-vit, but method finetune with these options has no original model"),
        ({"original": "tiny-vit", "lock_text": True}, "leave --lock-text out"),
        ({"original": "ViT-B-32"}, "--original: got ViT-B-32 without weights, and random ones"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_original_is_refused_in_one_line(
    run: Run, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        run(**options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "logs").exists()


def test_an_original_sees_the_pixels_of_the_student(
    start_model: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(start_model["model"].removeprefix("local-dir:"), folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["preprocess_cfg"]["resize_mode"] = "squash"
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    student = load_start(start_model["model"])
    original = load_original(RunConfig(original=f"local-dir:{folder}"), student, "cpu")
    assert original is not None and original.preprocess is student.preprocess


def test_a_model_of_other_images_is_refused(
    run: Run, start_model: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(start_model["model"].removeprefix("local-dir:"), folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(InputError, match="normalisation"):
        run(original=f"local-dir:{folder}")


def test_a_locked_text_tower_that_is_the_same_may_be_shared(
    run: Run, start_model: dict[str, str]
) -> None:
    named = run("named", method="mulki", lock_text=True, original=start_model["model"])
    hashes = hashes_of(named.path)
    assert hashes["original"] == hashes["weights"] and len(named.matrix.tasks) == 2
