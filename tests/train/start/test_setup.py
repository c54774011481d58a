"""What is checked and decided before the run folder is made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mulki.data import transforms
from mulki.data.made_images import MadeImages
from mulki.errors import InputError
from mulki.runs.results import read_evaluations
from mulki.train import rows, task_learner
from mulki.train.config.precision import Precision
from mulki.train.config.run_config import resolve
from mulki.train.start import setup
from tests.data.published.conftest import data_root, written
from tests.train.run_helpers import SHORT, Run, weights
from tests.train_helpers import COLOURS, same_state, write_task

__all__ = ["data_root", "written"]


@pytest.mark.parametrize("broken", ["transform", "precision"])
def test_what_fails_before_training_leaves_no_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(*given: Any) -> None:
        raise ZeroDivisionError

    if broken == "transform":
        monkeypatch.setitem(transforms._BUILDERS, "crop", fails)
    else:
        monkeypatch.setattr(Precision, "convert", fails)
    with pytest.raises((InputError, ZeroDivisionError)) as caught:
        run(augment="crop")
    assert (broken == "transform") == isinstance(caught.value, InputError)
    assert not (tmp_path / "logs").exists()


def test_random_start_weights_come_from_the_seed(run: Run, tiny_models: tuple[str, ...]) -> None:
    random = {"model": "tiny-vit", "pretrained": "none", "method": "finetune"}
    one, two, other = (run(f"{i}", seed=s, **random) for i, s in enumerate((0, 0, 1)))
    hashes = [
        json.loads((f.path / "env.json").read_text())["hashes"]["weights"]
        for f in (one, two, other)
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert same_state(weights(one), weights(two))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(task_learner, "learn_task", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(rows.Evaluator, "accuracy", lambda *a, **k: pytest.fail("evaluated"))
    yield


def test_taken_folder_is_left_alone(run: Run, tmp_path: Path, no_training: None) -> None:
    taken = tmp_path / "logs" / "first"
    taken.mkdir(parents=True)
    (taken / "matrix.csv").write_text("mine")
    with pytest.raises(InputError, match=re.escape(str(taken))):
        run()
    assert [p.name for p in taken.iterdir()] == ["matrix.csv"]
    assert (taken / "matrix.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda:99"}, "--device: cuda:99"),
        ({"device": "toaster"}, "--device: toaster"),
        ({"model": "tiny-vitt"}, "tiny-vitt"),
        ({"model": "local-dir:nowhere"}, "nowhere"),
        ({"tasks": ("nowhere",)}, "nowhere"),
        ({"lock_text": True, "lock_image": True}, "--lock-image"),
        ({"lr_of": ("colour=1e-3",)}, 'no task is called so (did you mean "colours"?)'),
        ({"lora_targets": ("attn",)}, "--lora-targets: got attn without adapters"),
        ({"method": "keeplora"}, "--method keeplora: it learns adapters alone; pass their"),
        ({"lora_alpha": 2.0}, "--lora-alpha: got 2.0 without adapters"),
        ({"lora_rank": 2, "lora_targets": ("qkv",)}, "--lora-targets: got 'qkv', but no linear"),
        ({"lora_rank": 64}, "--lora-rank: got 64, but transformer."),
        ({"lora_rank": 2, "lock_image": True}, "--lock-image: adapters freeze all weights"),
        ({"head_weight": 2.0, "head": False}, "--head-weight: got 2 beside --no-head; leave one"),
        ({"head_drift": "sdc", "head": False}, "--head-drift: got sdc, but --no-head keeps no"),
        ({"head_drift": "sdc", "lock_image": True}, "--head-drift: got sdc, but features do not"),
        ({"head_drift": "sdc", "method": "zero_shot"}, "--head-drift: got sdc, but method zero_"),
        ({"lora_rank": 2, "method": "zero_shot"}, "--lora-rank: method zero_shot learns nothing"),
        ({"lora_rank": 2, "method": "ewc"}, "method ewc with these options takes Fisher"),
        ({"lora_rank": 2, "method": "wise_ft"}, "a mean of weights"),
        (
            {"lora_rank": 2, "method": "mulki", "alpha": 0.5},
            "method mulki with these options takes a mean",
        ),
    ],
)
def test_bad_input_is_found_before_the_folder_is_made(
    run: Run, tmp_path: Path, no_training: None, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        run(**options)
    assert not (tmp_path / "logs").exists()


def test_made_images_follow_the_changes_and_the_seed_of_the_run(
    start_model: dict[str, str], task_folders: tuple[str, str]
) -> None:
    given = {
        "tasks": task_folders,
        "method": "snd",
        "reference": "made",
        "device": "cpu",
        "seed": 3,
    }
    changes = ("noise", "average")
    options = SHORT | start_model | given | {"reference_changes": changes}
    with setup.prepared(resolve(options), write=False) as prepared:
        task = prepared.tasks[0]
        reference = prepared.reference_of(task)
    assert reference is not None
    wanted = MadeImages(task.train, changes, 3)
    for place in range(len(wanted)):
        assert reference.images.load(place).tobytes() == wanted.load(place).tobytes()


def test_bad_adapters_are_found_before_the_cache_is_made(
    run: Run, tmp_path: Path, no_training: None
) -> None:
    with pytest.raises(InputError, match="--lora-rank: got 64"):
        run(method="mulki", lora_rank=64, teacher_cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_run_with_adapters_says_how_many_parameters_train(run: Run) -> None:
    folder = run(method="finetune", lora_rank=2, lora_targets=("out_proj",))
    counts = json.loads((folder.path / "env.json").read_text())["parameters"]
    # One block in each tower, of widths 32 and 16.
    assert counts["trained"] == 2 * (32 + 32) + 2 * (16 + 16)
    whole = sum(value.numel() for value in weights(folder).values())
    assert counts["stored"] == whole
    log = (folder.path / "out.log").read_text()
    assert f"{counts['trained']} train, in adapters of 2 weights" in log


def test_limited_images(run: Run) -> None:
    folder = run(limit_images=4, method="zero_shot")
    assert {(e.eval_dataset, e.n) for e in read_evaluations(folder.path / "results.jsonl")} == {
        ("colours", 4),
        ("shades", 4),
        ("all-seen", 4),
        ("all-seen", 8),
    }


def test_a_class_incremental_run_counts_all_classes_seen(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shades = {name: (60 * i, 60 * i, 60 * i) for i, name in enumerate("abcd")}
    folder = str(write_task(tmp_path / "shades", shades, train=3))
    options = {"tasks": [folder], "scenario": "cil", "increments": "2", "label_space": "seen"}
    done = run(method="zero_shot", **options)
    assert done.matrix.columns == ("shades-1", "shades-2")
    seen = done.class_incremental.after
    assert list(seen) == ["shades-1", "shades-2"]
    # In this label space the last row is the accuracy among all classes.
    assert seen["shades-2"] == pytest.approx(sum(done.matrix.rows[1]) / 2)
    assert "same prompts" not in caplog.text


def test_classes_of_two_tasks_are_told_of_where_they_compete(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [str(write_task(tmp_path / name, COLOURS, train=3)) for name in ("one", "two")]
    run(method="zero_shot", tasks=names, label_space="all")
    (line,) = [each for each in caplog.messages if "same prompts" in each]
    assert "red (one, two)" in line


def test_a_run_of_published_data_sets(run: Run, data_root: Path) -> None:
    tasks = ["mtil:mnist", "mtil:eurosat"]
    done = run(tasks=tasks, data_root=str(data_root), protocol="zscl", method="zero_shot")
    assert done.matrix.columns == ("mnist", "eurosat")
    hashes = json.loads((done.path / "env.json").read_text())["hashes"]
    assert set(hashes["prompts"]) == set(hashes["splits"]) == {"mnist", "eurosat"}
    assert "protocol: zscl" in (done.path / "args.yaml").read_text()
    assert "prompts " in (done.path / "summary.md").read_text()
    with pytest.raises(InputError, match="^--data-root: "):
        run("second", tasks=tasks, method="zero_shot")
    assert not (done.path.parent / "second").exists()


def test_global_generators_are_seeded(run: Run) -> None:
    run(seed=3, method="zero_shot")
    drawn = torch.rand(1)
    run("second", seed=3, method="zero_shot")
    assert torch.equal(drawn, torch.rand(1))
