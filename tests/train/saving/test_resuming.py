from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from mulki.clip.evaluation import Evaluator
from mulki.clip.features import Features
from mulki.clip.tensor_files import load_tensors, save_tensors
from mulki.data.decoding import BadImage
from mulki.data.image_files import ImageFiles
from mulki.distributed.world import World
from mulki.errors import InputError, Stopped
from mulki.methods import TaskStart
from mulki.methods.finetune import Finetune
from mulki.runs.folder import RunFolder
from mulki.runs.lock import FolderLock
from mulki.train import sequence
from mulki.train.config.precision import Precision
from mulki.train.config.presets import RELATIONS
from mulki.train.learning import learn
from mulki.train.learning.class_step import ClassStep
from mulki.train.rows import Rows
from mulki.train.saving import recovery
from mulki.train.saving.checkpoints import kept_of
from mulki.train.saving.recovery import read_save
from tests.sweeps import mostly_long
from tests.train.crafted_method import Crafted
from tests.train.run_helpers import (
    Run,
    check_same,
    results_of,
    resumed,
    stop_at,
    weights,
)
from tests.train_helpers import COLOURS, SHADES, same_state, write_split

# Options under which every kind of state matters.
CASES: dict[str, dict[str, Any]] = {
    "mulki": {"method": "mulki", "we_every": 2, "alpha": 0.8, "l2": 0.1, "anchors": "both",
              "anchors_per_step": 3, "augment": "crop", **RELATIONS, "gate": "uniform"},
    "learnable": {"method": "mulki", "prototype_update": "learnable", "grad_clip_norm": 1.0},
    "words": {"method": "mulki", "anchors": "vocabulary", "anchor_texts": "student",
              "anchors_per_step": 4, "lock_text": True},
    "validation": {"method": "lwf", "val_fraction": 0.4, "val_every": 1, "augment": "crop"},
    "early": {"method": "finetune", "val_fraction": 0.4, "val_every": 1, "early_stopping": 3,
              "iterations": 6},
    "balanced": {"method": "lwf", "sampling": "balanced", "layer_decay": 0.8,
                 "lr_text_tower": 0.1, "warmup": 2},
    "snd": {"method": "snd", "reference": "current", "reference_batch_size": 4},
    "made": {"method": "mulki", "hold_on": "both", "gate": "discrepancy"},
    "zscl": {"method": "zscl", "reference": "current", "we_every": 2},
    "wise_ft": {"method": "wise_ft", "wise_base": "zero_shot"},
    "er": {"method": "er", "buffer_size": 5, "replay_batch_size": 4, "augment": "crop"},
    "reservoir": {"method": "er", "buffer_size": 7, "buffer": "reservoir", "micro_batch": 2},
    "drift": {"method": "finetune", "head_drift": "sdc", "augment": "crop", "opt": "muon"},
    "ewc": {"method": "ewc", "fisher_images": 5, "ewc_decay": 0.5},
    "original": {"method": "mulki", "original": "tiny-vit"},
    "adapters": {"method": "mulki", "lora_rank": 2, "anchors": "both", "l2": 0.1,
                 "augment": "crop", "grad_checkpointing": True},
    "keeplora": {"method": "keeplora", "lora_rank": 2, "layer_scale": 0.5, "energy_image": 0.3},
    "crafted": {"method": "crafted", "noise": 0.1, "augment": "crop", "micro_batch": 2,
                "lora_rank": 2, "grad_checkpointing": True},
    "some adapters": {"method": "mulki", "lora_rank": 3, "lora_targets": ("attn",),
                      "lora_alpha": 6.0, "original": "tiny-vit", "opt": "muon"},
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    mostly_long(
        CASES,
        *("mulki", "early", "drift", "er", "ewc", "crafted"),
    ),
)
def test_a_stopped_run_ends_as_if_it_had_not_been(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    options = CASES[case]
    monkeypatch.setattr(Crafted, "name", "crafted", raising=False)
    whole = run("whole", **options)
    folder = tmp_path / "logs" / "stopped"
    # In the first task, and four steps later in the second.
    for steps, go in ((3, lambda: run("stopped", **options)), (4, lambda: resumed(folder))):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
            stop_at(patch, steps, RuntimeError("stop"))
            go()
        # What a new process starts from is not what this one ends with.
        random.random(), np.random.rand(), torch.rand(3)
    check_same(resumed(folder).path, whole.path)


class Drawing(Finetune):
    """With parameters and buffers of its own, drawn at random, some of which grow."""

    def __init__(self, options: Finetune.Options):
        super().__init__(options)
        self.shift = nn.Parameter(torch.randn(3))
        self.pool = nn.Parameter(torch.zeros(0, 2))
        self.register_buffer("means", torch.zeros(0, 2))

    def start_task(self, task: TaskStart) -> None:
        self.pool = nn.Parameter(torch.cat([self.pool.detach()[: task.index], torch.randn(1, 2)]))

    def losses(self, student: Features, *given: Any) -> dict[str, Tensor]:
        return super().losses(student, *given) | {"own_loss": self.shift.sum() + self.pool.sum()}

    def end_task(self) -> None:
        self.means = torch.cat([self.means, self.pool.detach()[-1:]])

    def kept(self) -> dict[str, Tensor]:
        return {"means": self.means, "shift": self.shift.detach(), "pool": self.pool.detach()}


def test_a_methods_own_tensors(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Drawing, "name", "drawing")
    whole = run("whole", method="drawing")
    torch.rand(7)
    folder = tmp_path / "logs" / "stopped"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 2, RuntimeError("stop"))
        run("stopped", method="drawing")
    # Between the tasks, and in the second one.
    for between in (True, False):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
            if between:
                patch.setattr(Rows, "of_model", fails)
            else:
                stop_at(patch, 2, RuntimeError("stop"))
            resumed(folder)
    stopped = resumed(folder)
    check_same(stopped.path, whole.path)
    found = [load_tensors(kept_of(f.path / "checkpoints/latest"))[0] for f in (whole, stopped)]
    assert found[0]["means"].shape == (2, 2) and same_state(*found)


@pytest.mark.parametrize(
    ("case", "work"),
    [("ewc", "fisher_diagonal"), ("keeplora", "input_moments"), ("validation", "Validation")],
)
def test_a_run_that_is_stopped_after_the_last_step_of_a_task(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str, work: str
) -> None:
    options = {"val_fraction": 0.3, "method": "finetune", **CASES.get(case, {}), "save_every": 0}
    whole = run("whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        place = learn.Validation if work == "Validation" else learn
        name = "keep_best" if work == "Validation" else work
        real = getattr(place, name)

        def stopped(*given: Any) -> None:
            real(*given)
            raise Stopped(signal.SIGINT)

        patch.setattr(place, name, stopped)
        run("stopped", **options)
    folder = tmp_path / "logs" / "stopped"
    check_same(resumed(folder).path, whole.path)
    assert "goes on after 0 tasks and 4 steps" in (folder / "out.log").read_text()


@pytest.mark.parametrize("error", [Stopped(signal.SIGTERM), BadImage("a: cannot be read")])
def test_a_run_that_ends_in_the_class_statistics(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    options = {"method": "wise_ft", "head_drift": "sdc", "save_every": 0}
    whole = run("whole", **options)
    asked: list[Any] = []

    def ends(*given: Any) -> Any:
        asked.append(given)
        if len(asked) == 2:
            raise error
        return real(*given)

    real = sequence.class_moments
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(sequence, "class_moments", ends)
        run("stopped", **options)
    folder = tmp_path / "logs" / "stopped"
    check_same(resumed(folder).path, whole.path)
    assert "goes on after 2 tasks and 8 steps" in (folder / "out.log").read_text()


@pytest.mark.parametrize("between_tasks", [False, True])
def test_the_gradient_scaler_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, between_tasks: bool
) -> None:
    scalers: list[Any] = []
    real = Precision.__init__

    def scaling(self: Precision, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)
        scalers.append(self.scaler)

    monkeypatch.setattr(Precision, "__init__", scaling)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        if between_tasks:
            patch.setattr(sequence._Sequence, "_save", fails)
        else:
            stop_at(patch, 3, RuntimeError("stop"))
        run("stopped", method="finetune")
    resumed(tmp_path / "logs" / "stopped")
    # Twice as much after each of the eight steps; the precision of tests has one that is not used.
    assert max(scaler.get_scale() for scaler in scalers) == 2.0 * 2**8


def fails(*given: object) -> None:
    raise RuntimeError("stop")


@pytest.mark.parametrize("number", [3, 7])
def test_a_loss_that_is_not_finite_is_raised_after_a_save(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    """What made it NaN is gone when the run goes on: the state was that of the step before."""
    options = CASES["mulki"] | {"save_every": 0}
    whole = run("whole", **options)
    real, steps = ClassStep.gradients, []

    def gradients(self: ClassStep, *given: Any) -> dict[str, float]:
        losses = real(self, *given)
        steps.append(losses)
        return losses | ({"ce_loss": math.nan} if len(steps) == number else {})

    with monkeypatch.context() as patch, pytest.raises(InputError, match="ce_loss"):
        patch.setattr(ClassStep, "gradients", gradients)
        run("stopped", **options)
    folder = tmp_path / "logs" / "stopped"
    saved = recovery.read_state(folder)
    assert saved is not None and saved["steps"] + saved["in_task"]["steps"] == number - 1
    check_same(resumed(folder).path, whole.path)


def test_an_error_in_a_data_loading_process(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"method": "finetune", "augment": "crop", "workers": 1, "save_every": 0}
    whole = run("whole", **options)
    broken = tmp_path / "broken"
    broken.touch()
    real = ImageFiles.load

    def load(self: ImageFiles, index: int) -> Any:
        if index == 3 and self.root.name == "train" and broken.exists():
            raise BadImage("3.png: cannot be read")
        return real(self, index)

    monkeypatch.setattr(ImageFiles, "load", load)
    # Seconds that torch waits for the end of a process which has failed.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    with pytest.raises(BadImage, match="3.png"):
        run("stopped", **options)
    broken.unlink()
    check_same(resumed(tmp_path / "logs" / "stopped").path, whole.path)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_during_an_evaluation(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run("whole", method="finetune")
    real, asked = Evaluator.answers, []

    def answers(self: Evaluator, *given: Any) -> Any:
        asked.append(given)
        if len(asked) == 4:  # the second data set after the first task
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *given)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="SIGTERM"):
        patch.setattr(Evaluator, "answers", answers)
        run("stopped", method="finetune")
    check_same(resumed(tmp_path / "logs" / "stopped").path, whole.path)


def test_one_process_goes_on_with_a_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 3, RuntimeError("stop"))
        run("stopped", method="finetune")
    folder = tmp_path / "logs" / "stopped"
    lock = FolderLock(folder)
    with pytest.raises(InputError, match="stopped"):
        resumed(folder)
    lock.release()
    out = io.StringIO()
    assert resumed(folder, Console(file=out)).status == "complete"
    assert "goes on after 0 tasks and 3 steps" in out.getvalue().splitlines()


def test_tasks_that_have_changed_since(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task_folders: tuple[str, str]
) -> None:
    tasks = tuple(str(shutil.copytree(each, tmp_path / Path(each).name)) for each in task_folders)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 3, RuntimeError("stop"))
        run("stopped", method="finetune", tasks=tasks)
    folder = tmp_path / "logs" / "stopped"
    image = Path(tasks[1], "train", "dark", "0.png")
    kept = image.read_bytes()
    Image.new("RGB", (32, 32)).save(image)
    with pytest.raises(InputError, match="the tasks are not those that .*stopped began with"):
        resumed(folder)
    image.write_bytes(kept)
    assert resumed(folder).status == "complete"


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("name", ["summary.json", "results.jsonl", "out.log", "recovery"])
def test_a_pipe_in_a_run_folder_is_not_opened(stopped: Path, name: str) -> None:
    pipe = stopped / name
    pipe = pipe / recovery.FILE if pipe.is_dir() else pipe
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(InputError, match=f"{pipe.name}: "):
        resumed(stopped)


def test_what_a_save_does_not_hold_would_be_seen(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The case above is sharp: without the optimiser's moments the weights are others."""
    whole = run("whole", method="lwf")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, 3, RuntimeError("stop"))
        run("stopped", method="lwf")
    file = tmp_path / "logs" / "stopped" / "recovery" / recovery.FILE
    state = recovery.read_state(tmp_path / "logs" / "stopped")
    assert state is not None
    for of_one in state["in_task"]["step"]["optimizer"]:
        of_one["exp_avg"].zero_()
    recovery.write_state(file, state)
    assert not same_state(weights(resumed(tmp_path / "logs" / "stopped")), weights(whole))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("flip", "recovery.*checksum"),
        ("cut", "recovery"),
        ("version", "a save of another version of mulki; go on with that version"),
        ("matrix", "rows of results"),
        ("lines", "no line of the row zero-shot of matrix.csv"),
        ("weights", "weights are not those"),
        ("processes", "3 processes, these are 1"),
        ("processes, no save", "3 processes"),
    ],
)
def test_what_cannot_go_on(stopped: Path, damage: str, said: str) -> None:
    folder = stopped
    file = folder / "recovery" / recovery.FILE
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "version":
        tensors, known = load_tensors(file)
        save_tensors(file, tensors, known | {"format": "1"})
    elif damage == "matrix":
        rows = (folder / "matrix.csv").read_text().splitlines(keepends=True)
        (folder / "matrix.csv").write_text("".join(rows[:-1]))
    elif damage == "lines":
        lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if "zero-shot" not in line]
        (folder / "results.jsonl").write_text("".join(kept))
    elif damage == "weights":
        known = json.loads((folder / "env.json").read_text())
        known["hashes"]["weights"] = "other"
        (folder / "env.json").write_text(json.dumps(known))
    elif damage == "processes":
        state = recovery.read_state(folder)
        assert state is not None
        recovery.write_state(file, state | {"processes": 3})
    else:
        file.unlink()
        rows = (folder / "matrix.csv").read_text().splitlines(keepends=True)
        (folder / "matrix.csv").write_text("".join(rows[:2]))
        known = json.loads((folder / "env.json").read_text())
        (folder / "env.json").write_text(json.dumps(known | {"processes": 3}))
    with pytest.raises(InputError, match=said):
        resumed(folder)


def test_a_run_goes_on_without_the_package_of_a_tracker(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 3, RuntimeError("stop"))
        run("stopped")
    folder = tmp_path / "logs" / "stopped"
    options = yaml.safe_load((folder / "args.yaml").read_text()) | {"report_to": ["wandb"]}
    (folder / "args.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.setattr("mulki.runs.trackers._installed", lambda name: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert resumed(folder).status == "complete"
    assert "no curves for wandb" in (folder / "out.log").read_text()


def test_every_process_has_to_see_the_same_save(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="gone "):
        read_save(tmp_path / "gone", World(1, 2))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 3, RuntimeError("stop"))
        run("stopped")
    folder = tmp_path / "logs" / "stopped"
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(World, "agree", lambda *given, **facts: seen.append(facts))
    saved = recovery.read_state(folder)
    resumed(folder)
    assert saved is not None and len(saved["sha256"]) == 64
    assert seen[0]["save (hash)"] == saved["sha256"]


def test_a_run_that_is_complete_gets_its_reports_again(run: Run) -> None:
    folder = run(method="zero_shot").path
    before = results_of(folder)
    (folder / "summary.md").unlink()
    (folder / "recovery").mkdir()
    (folder / ".report.html.1234.tmp").write_text("half")
    assert resumed(folder).status == "complete"
    assert "Status: complete" in (folder / "summary.md").read_text()
    assert not (folder / "recovery").exists() and not list(folder.glob(".*"))
    assert results_of(folder) == before


def test_a_run_without_training_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run("whole", method="zero_shot")
    real, rows = RunFolder.add_row, []

    def add_row(self: RunFolder, *given: Any) -> Any:
        rows.append(given)
        if len(rows) == 3:
            raise RuntimeError("stop")
        return real(self, *given)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(RunFolder, "add_row", add_row)
        run("stopped", method="zero_shot")
    assert results_of(resumed(tmp_path / "logs" / "stopped").path) == results_of(whole.path)


def test_a_run_goes_on_with_the_images_that_it_has_held_out(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_split(tmp_path / "whole", COLOURS, 5)
    write_split(tmp_path / "more", SHADES, 4)
    tasks = (str(tmp_path / "whole"), str(tmp_path / "more"))
    options = {"method": "finetune", "tasks": tasks, "test_fraction": 0.4}
    whole = run("all", **options)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 5, RuntimeError("stop"))
        run("stopped", **options)
    added = tmp_path / "whole" / "red" / "5.png"
    shutil.copy(added.with_name("0.png"), added)
    with pytest.raises(InputError, match="tasks"):
        resumed(tmp_path / "logs" / "stopped")
    added.unlink()
    check_same(resumed(tmp_path / "logs" / "stopped").path, whole.path)
