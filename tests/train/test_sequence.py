from __future__ import annotations

import csv
import errno
import fnmatch
import functools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from mulki import methods
from mulki.clip import models
from mulki.clip.head import read_statistics
from mulki.clip.models import VisionLanguageModel
from mulki.data import folder_task
from mulki.data.made_images import DEFAULT_CHANGES, MadeImages
from mulki.data.subset import Subset
from mulki.distributed.roll_call import Meeting
from mulki.errors import InputError, Stopped
from mulki.methods import PREVIOUS, ZERO_SHOT
from mulki.methods.finetune import Finetune
from mulki.runs.answers import read_answers, seen_accuracy
from mulki.runs.folder import RunFolder
from mulki.runs.metrics import read_matrix
from mulki.runs.results import read_evaluations
from mulki.train import sequence, task_learner
from mulki.train.config.presets import RELATIONS
from mulki.train.config.run_config import read_config, resolve
from mulki.train.display.progress import RunProgress
from mulki.train.learning import training_set
from mulki.train.learning.class_step import ClassStep
from mulki.train.learning.inputs import StepReport, TaskInputs, Training
from mulki.train.saving import recovery
from mulki.train.saving.checkpoints import load_checkpoint, publish, save_weights, statistics_of
from tests import ROOT
from tests.train.run_helpers import SHORT, Run, checkpoint_hashes, options_of, weights
from tests.train.saving.test_resuming import stop_at
from tests.train_helpers import COLOURS, Calls, same_state, state_of, write_pairs, write_task

METHODS = tuple(methods.available())


def rows_of(folder: RunFolder) -> list[list[str]]:
    with (folder.path / "matrix.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def run_of(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], RunFolder]:
    """A run of each method, made once and only read."""
    logs = str(tmp_path_factory.mktemp("methods"))

    @functools.cache
    def of(name: str) -> RunFolder:
        # With the default eps AdamW makes rounding errors as large as its steps.
        given = {"tasks": task_folders, "logs": logs, "name": name, "method": name, "eps": 1e-4}
        folder = sequence.run(resolve({**SHORT, **start_model, **given, **options_of(name)}))
        assert folder is not None
        return folder

    return of


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_a_complete_folder(
    run_of: Callable[[str], RunFolder], name: str
) -> None:
    path = run_of(name).path
    trains = methods.get(name).trains
    made = {p.name for p in path.iterdir()} - {"tensorboard"}
    if trains:
        assert made >= {"history.jsonl", "examples.json"}
        made -= {"history.jsonl", "examples.json"}
    wanted = {"args.yaml", "env.json", "out.log", "results.jsonl", "matrix.csv"}
    wanted |= {"summary.json", "summary.md", "report.html", "answers", "tasks.json"}
    assert made == wanted | ({"checkpoints"} if trains else set())

    header, *rows = rows_of(run_of(name))
    assert header == ["after_task", "colours", "shades"]
    assert [row[0] for row in rows] == ["zero-shot", "colours", "shades"]
    every = read_evaluations(path / "results.jsonl")
    evaluations = [e for e in every if e.metric == "acc1"]
    assert [(e.after_task, e.eval_dataset) for e in evaluations] == [
        (after, data) for after in ("zero-shot", "colours", "shades") for data in header[1:]
    ]
    assert [f"{e.value:.4f}" for e in evaluations] == [v for row in rows for v in row[1:]]
    assert [e.n for e in evaluations] == [15, 10] * 3
    steps = [0, 0, 4, 4, 8, 8] if trains else [0] * 6
    assert [e.step for e in evaluations] == steps

    seen = [e for e in every if e.metric == "acc1_seen"]
    heads = [e for e in every if e.metric in ("acc1_head", "acc1_seen_head")]
    assert [(e.after_task, e.eval_dataset, e.n) for e in heads] == [
        (after, data, n)
        for after, of_seen in (("colours", 15), ("shades", 25))
        for data, n in (("colours", 15), ("shades", 10), ("all-seen", of_seen))
    ]
    drift = [e for e in every if e.metric in ("word_agreement", "mean_distance")]
    assert len(seen) + len(evaluations) + len(heads) + len(drift) == len(every)
    with_original = name not in (
        *("zero_shot", "finetune", "wise_ft", "lwf", "lwf_vr", "er", "ewc", "keeplora"),
    )
    assert [(e.after_task, e.eval_dataset) for e in drift if e.metric == "word_agreement"] == [
        (after, data) for after in header[1:] * with_original for data in header[1:]
    ]
    assert [(e.after_task, e.eval_dataset) for e in drift if e.metric == "mean_distance"] == [
        ("colours", "colours"), ("shades", "colours"), ("shades", "shades")
    ] * trains  # fmt: skip
    assert [(e.after_task, e.eval_dataset, e.n) for e in seen] == [
        ("colours", "all-seen", 15), ("shades", "all-seen", 25)
    ]  # fmt: skip
    answers = read_answers(path)
    assert list(answers) == ["zero-shot", "colours", "shades"]
    assert [e.value for e in seen] == [
        seen_accuracy(answers[e.after_task].values())[0] for e in seen
    ]
    # With one task learned, one head is the head of that task.
    assert seen[0].value == evaluations[2].value

    summary = json.loads((path / "summary.json").read_text())
    after = {e.after_task: round(e.value, 4) for e in seen}
    assert summary["class_incremental"] == {
        "after": after, "average": sum(after.values()) / 2, "last": after["shades"]
    }  # fmt: skip
    assert summary["status"] == "complete" and summary["tasks"] == ["colours", "shades"]
    assert summary["method"] == name and summary["seed"] == 0
    words = ["a vocabulary of words"]
    uses = dict.fromkeys(("lwf_vr", "mulki", "zscl"), words)
    uses["er"] = ["class names of earlier tasks", "images of earlier tasks"]
    assert summary["uses"] == uses.get(name, [])
    assert summary["metrics"] == read_matrix(path / "matrix.csv").metrics().to_dict()
    assert "colours" in (path / "summary.md").read_text()
    assert "colours" in (path / "report.html").read_text()
    average, last = f"{sum(after.values()) / 2:.2f}", f"{after['shades']:.2f}"
    assert f"average {average}, last {last}" in (path / "summary.md").read_text()
    page = (path / "report.html").read_text()
    for title, value in (("average", average), ("last", last)):
        assert f'<dt>Class-incremental {title}</dt><dd class="value">{value}</dd>' in page

    args = yaml.safe_load((path / "args.yaml").read_text())
    assert args["method"] == name and args["lr"] == 1e-3 and args["device"] == "cpu"
    hashes = json.loads((path / "env.json").read_text())["hashes"]
    assert set(hashes["tasks"]) == set(hashes["prompts"]) == {"colours", "shades"}
    assert set(hashes["splits"]) == {"colours", "shades"}
    assert re.fullmatch("[0-9a-f]{64}", hashes["weights"])

    if trains:
        names = {p.name for p in (path / "checkpoints").iterdir()}
        tasks = {f"task_{i:02d}_{t}.safetensors" for i, t in ((1, "colours"), (2, "shades"))}
        own = {"ewc": ["method"], "keeplora": ["method", "adapters"]}
        beside = ["class_statistics", *own.get(name, [])]
        files = {f"{kind}_{task}" for kind in beside for task in tasks}
        assert names == tasks | files | {"latest"}
        assert (path / "checkpoints" / "latest" / "class_statistics.safetensors").is_file()
        log = (path / "out.log").read_text()
        for task in ("colours", "shades"):
            for step in (1, 2, 4):
                line = rf"{task} step {step}: ce \d+\.\d{{3}}.*, lr [\d.e-]+, \d+ img/s"
                assert re.search(line, log)
            assert f"{task} step 3:" not in log


def test_zero_shot_row_of_every_method_is_that_of_the_start_model(
    run_of: Callable[[str], RunFolder],
) -> None:
    assert len({run_of(name).matrix.zero_shot for name in METHODS}) == 1


@pytest.mark.parametrize("options", [{"iterations": 3}, {"epochs": 0.5}])
def test_saved_configuration_repeats_the_run(run: Run, options: dict[str, Any]) -> None:
    given = {"method": "mulki", "gate": "uniform", "seed": 5, **options}
    first = run(**given)
    settings = resolve(read_config(first.path / "args.yaml") | {"name": "again"})
    again = sequence.run(settings)
    assert same_state(weights(first), weights(again))
    assert rows_of(first) == rows_of(again)


def test_a_report_that_fails_does_not_fail_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(path: Path) -> None:
        raise RuntimeError("no space")

    monkeypatch.setattr(sequence, "write_report", fails)
    folder = run(method="zero_shot")
    assert folder.status == "complete" and (folder.path / "matrix.csv").exists()
    assert "no report in " in caplog.text and "RuntimeError: no space" in caplog.text


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_same_seed_same_bits_other_seed_other_weights(run: Run, augment: str) -> None:
    one, two, other = (
        run(f"{i}", method="mulki", augment=augment, seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    assert rows_of(one) == rows_of(two)
    assert same_state(weights(one), weights(two))
    assert checkpoint_hashes(one) == checkpoint_hashes(two)
    assert not same_state(weights(one), weights(other))


@pytest.mark.long
def test_a_process_of_its_own_gives_the_same_bits(
    run: Run, tmp_path: Path, start_model: dict[str, str], task_folders: tuple[str, str]
) -> None:
    options = {"method": "mulki", "anchors": "both", "anchors_per_step": 3, "deterministic": True}
    here = run("here", **options)
    given = {**SHORT, **start_model, **options, "tasks": task_folders, "logs": str(tmp_path)}
    (tmp_path / "there.yaml").write_text(
        yaml.safe_dump(resolve({**given, "name": "there"}).to_dict())
    )
    done = subprocess.run(
        [sys.executable, "-m", "mulki", "run", "--config", str(tmp_path / "there.yaml")],
        cwd=ROOT,
        # Sets have another order there.
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    there = RunFolder.open(tmp_path / "there")
    assert rows_of(here) == rows_of(there)
    assert same_state(weights(here), weights(there))
    hashes = checkpoint_hashes(here)
    assert hashes == checkpoint_hashes(there)
    kinds = ("task_0*", "class_statistics_task_0*", "latest/*.safetensors", "latest/*.json")
    assert [len(fnmatch.filter(hashes, kind)) for kind in kinds] == [2, 2, 2, 1]


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_workers_change_nothing(run: Run, augment: str) -> None:
    alone, helped = (
        run(f"{workers}", method="mulki", workers=workers, augment=augment, iterations=2)
        for workers in (0, 2)
    )
    assert rows_of(alone) == rows_of(helped)
    assert same_state(weights(alone), weights(helped))


class Learned:
    """Copies of what `learn_task` got and left behind, task by task."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.frozen: list[dict[str, VisionLanguageModel]] = []
        self.teachers: list[dict[str, dict[str, torch.Tensor]]] = []
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []
        real = task_learner.learn_task

        def spy(training: Training, inputs: TaskInputs, *others: Any) -> int:
            self.frozen.append(dict(inputs.frozen))
            self.teachers.append({name: state_of(m) for name, m in inputs.frozen.items()})
            self.before.append(state_of(training.model))
            steps = real(training, inputs, *others)
            self.after.append(state_of(training.model))
            return steps

        patch.setattr(task_learner, "learn_task", spy)


def test_teachers_are_the_original_and_the_previous_model(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task_folders: tuple[str, str]
) -> None:
    third = write_task(tmp_path / "third", COLOURS, train=2, test=1)
    seen = Learned(monkeypatch)
    run(method="mulki", tasks=(*task_folders, str(third)))
    original = seen.before[0]
    assert seen.frozen[0][ZERO_SHOT] is seen.frozen[0][PREVIOUS]
    for i in range(3):
        assert same_state(seen.teachers[i][ZERO_SHOT], original)
        assert not same_state(seen.after[i], seen.before[i])
    for i in (1, 2):
        assert same_state(seen.teachers[i][PREVIOUS], seen.after[i - 1])
        assert same_state(seen.before[i], seen.after[i - 1])
        assert seen.frozen[i][PREVIOUS] is not seen.frozen[i][ZERO_SHOT]


@pytest.mark.parametrize("held", ["task", "made"])
def test_frozen_models_are_encoded_once_per_task(
    run: Run, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    calls = Calls(monkeypatch)
    seen = Learned(monkeypatch)
    run(method="mulki", anchors="none", **RELATIONS if held == "task" else {})
    original, previous = seen.frozen[1][ZERO_SHOT], seen.frozen[1][PREVIOUS]
    # colours: 3 texts, 18 images; shades: 2 texts, 12 images; and once words and test images, by
    # which it is seen how far the student has moved.
    assert calls.of(original, "texts") == [3, 256, 2]
    # By default as many made images come on top, for the student's first prototypes are those of
    # the task's images.
    made = 18 + 12 if held == "made" else 0
    assert sum(calls.of(original, "images")) == 18 + 12 + made + (15 + 10)
    assert calls.of(previous, "texts") == [2]
    assert sum(calls.of(previous, "images")) == 12


def test_methods_without_teachers_copy_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[VisionLanguageModel] = []
    real = VisionLanguageModel.frozen_copy
    monkeypatch.setattr(
        VisionLanguageModel, "frozen_copy", lambda self: copied.append(self) or real(self)
    )
    run(method="finetune")
    assert not copied
    run(name="other", method="lwf")
    assert copied


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of luck")])
def test_what_ends_a_run_leaves_its_results(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    steps: list[StepReport] = []
    real = RunProgress.step

    def step(self: RunProgress, report: StepReport) -> None:
        steps.append(report)
        if len(steps) == 6:  # the second step of the second task
            raise error
        real(self, report)

    monkeypatch.setattr(RunProgress, "step", step)
    with pytest.raises(type(error)):
        run(method="mulki")
    path = tmp_path / "logs" / "first"
    matrix = read_matrix(path / "matrix.csv")
    assert matrix.tasks == ("colours",) and matrix.zero_shot is not None
    summary = json.loads((path / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["tasks"] == ["colours"]
    # Two of the start model; of the first task two, all seen, and these with a head, and how far
    # the model has moved.
    assert len(read_evaluations(path / "results.jsonl")) == 2 + 2 * 3 + 3
    assert list(read_answers(path)) == ["zero-shot", "colours"]
    assert "interrupted" in (path / "summary.md").read_text()
    assert type(error).__name__ in (path / "out.log").read_text()
    model = models.load(f"local-dir:{path / 'checkpoints' / 'latest'}")
    assert same_state(model.checkpoint(), weights(path, "task_01*"))


def test_a_second_signal_while_the_report_is_written_ends_it_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop_at(monkeypatch, 2, Stopped(signal.SIGINT))

    def interrupted(path: Path) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(sequence, "write_report", interrupted)
    with pytest.raises(Stopped, match="SIGTERM") as caught:
        run()
    folder = str(tmp_path / "logs" / "first")
    assert (caught.value.resume, caught.value.results) == (folder, folder)


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_weights_that_diverge_in_the_last_step_are_not_a_result(
    run: Run, tmp_path: Path, lr: float
) -> None:
    """The loss was finite before that step, and the model it leaves is not."""
    with pytest.raises(InputError, match="finite|NaN"):
        run(method="finetune", iterations=1, lr=lr)
    path = tmp_path / "logs" / "first"
    assert json.loads((path / "summary.json").read_text())["status"] == "interrupted"
    assert read_matrix(path / "matrix.csv").tasks == ()
    assert not list(path.rglob("task_*")) and not list(path.rglob("open_clip*"))


@pytest.mark.parametrize(("options", "updates"), [({}, 8), ({"spike_guard": 5.0}, 6)])
def test_a_loss_that_explodes_is_reported(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    updates: int,
) -> None:
    gradients, update = ClassStep.gradients, ClassStep.update
    calls: list[str] = []

    def exploding(self: ClassStep, *given: Any) -> dict[str, float]:
        calls.append("gradients")
        losses = gradients(self, *given)
        # The third step of each task.
        return {k: v * (30 if calls.count("gradients") % 4 == 3 else 1) for k, v in losses.items()}

    def counted(self: ClassStep, lr: float) -> None:
        calls.append("update")
        update(self, lr)

    # What counts steps, such as a running mean, counts those that are left out too.
    monkeypatch.setattr(Finetune, "after_step", lambda self, step: calls.append(f"after {step}"))

    monkeypatch.setattr(ClassStep, "gradients", exploding)
    monkeypatch.setattr(ClassStep, "update", counted)
    with caplog.at_level(logging.WARNING, "mulki"):
        run(method="finetune", **options)
    assert calls.count("gradients") == 8 and calls.count("update") == updates
    assert [c for c in calls if c.startswith("after")] == [f"after {n}" for n in (1, 2, 3, 4)] * 2
    for task in ("colours", "shades"):
        assert f"task {task}: the loss of 1 steps, step 3 the first" in caplog.text


@pytest.mark.parametrize(("method", "bad"), [("zero_shot", "nan"), ("mulki", "inf")])
def test_start_weights_that_are_not_finite_are_refused(
    run: Run, start_model: dict[str, str], tmp_path: Path, method: str, bad: str
) -> None:
    model = models.load(start_model["model"])
    with torch.no_grad():
        model.clip.visual.proj[0, 0] = float(bad)
    save_weights(model, tmp_path / "bad.safetensors")
    publish(model, tmp_path / "bad.safetensors", tmp_path / "bad")
    with pytest.raises(InputError, match="1 of .* weights hold a NaN or an infinity.*visual.proj"):
        run(method=method, model=f"local-dir:{tmp_path / 'bad'}")
    assert not (tmp_path / "logs").exists()


def test_locked_model_can_be_evaluated(run: Run) -> None:
    assert run(method="zero_shot", lock_text=True, lock_image=True).status == "complete"


def test_skipped_images_are_counted(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = write_task(tmp_path / "damaged", COLOURS, train=3, test=2)
    (task / "train" / "red" / "0.png").write_bytes(b"no image")
    (task / "test" / "blue" / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"\.png"):
        run(tasks=(str(task),))
    with caplog.at_level(logging.WARNING, "mulki"):
        folder = run(tasks=(str(task),), skip_bad_images=True)
    assert "task damaged: unreadable images left out: 2" in caplog.text
    assert "task damaged: unreadable images left out: 2" in (folder.path / "out.log").read_text()
    assert {e.n for e in read_evaluations(folder.path / "results.jsonl")} == {5}
    assert len(read_answers(folder.path)["damaged"]["damaged"].own) == 5


# Methods do not see micro-batches, so those that are alike to a step are left out, and a last one
# that is smaller is tried with two. Nor do they see activation checkpointing, but for the ones that
# take gradients or replay of their own.
ALIKE = ("finetune", "lwf", "lwf_vr", "snd", "wise_ft")
SAVING = [
    (method, options)
    for method in METHODS
    for options in ({"micro_batch": "1"}, {"micro_batch": "4"}, {"grad_checkpointing": True})
    if methods.get(method).trains
    and method not in ALIKE
    and ("4" not in options.values() or method in ("mulki", "er"))
    and ("grad_checkpointing" not in options or method in ("mulki", "er", "ewc", "keeplora"))
]


@pytest.mark.parametrize(("method", "options"), SAVING)
def test_memory_is_saved_without_another_result(
    run: Run, run_of: Callable[[str], RunFolder], method: str, options: dict[str, Any]
) -> None:
    plain = run_of(method)
    ours = run("ours", method=method, eps=1e-4, **options_of(method), **options)
    assert ours.matrix == plain.matrix
    wanted, start = weights(plain), weights(plain, "task_01*")
    for key, value in weights(ours).items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=2e-5)
    assert max(float((v - start[k]).abs().max()) for k, v in wanted.items()) > 1e-3


def test_the_micro_batch_that_fits_is_told(run: Run) -> None:
    folder = run(micro_batch="auto")
    log = (folder.path / "out.log").read_text()
    assert re.search(
        r"--micro-batch auto: 6 of 6 images at a time \(\d+\.\d MiB an image, \d+ MiB free\)", log
    )


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "amp_bfloat16", "amp"])
def test_half_precision_learns(run: Run, precision: str) -> None:
    folder = run(precision=precision, method="finetune", lr=3e-3, iterations=30)
    stored = {v.dtype for n, v in weights(folder).items() if n.endswith("weight")}
    half = {"bf16": {torch.bfloat16, torch.float32}, "pure_bf16": {torch.bfloat16}}
    assert stored == half.get(precision, {torch.float32})
    assert folder.matrix.metrics().last > folder.matrix.zero_shot_metrics().last + 10


def test_student_and_teachers_are_compiled_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[VisionLanguageModel] = []
    monkeypatch.setattr(VisionLanguageModel, "compile", lambda model: compiled.append(model))
    run("plain")
    assert compiled == []
    run("ours", torchcompile=True)
    assert len(compiled) == len({id(model.clip) for model in compiled}) == 3


def test_without_checkpoints(run: Run) -> None:
    assert not (run(save_checkpoints=False).path / "checkpoints").exists()


def test_kept_means_move_with_the_features_of_a_later_task(
    run: Run, task_folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_set, "_SAMPLE", 5)
    kept, moved = (
        run(str(drift), method="finetune", lr=1e-2, head_drift=drift) for drift in (None, "sdc")
    )
    old, new = (read_statistics(statistics_of(folder.latest)) for folder in (kept, moved))
    whole = folder_task(task_folders[1]).train
    # At even distances, so that all classes are there.
    own = Subset(whole, [i * len(whole) // 5 for i in range(5)])
    assert len(whole) > 5 and {*own.targets} == {*whole.targets}
    sets = own, MadeImages(own, DEFAULT_CHANGES, 0)

    @torch.no_grad()
    def features(task: str) -> torch.Tensor:
        model = load_checkpoint(kept.path / "checkpoints" / f"{task}.safetensors")
        return torch.cat(
            [
                model.encode_images(
                    torch.stack([model.preprocess(of.load(i)) for i in range(len(of))])
                )
                for of in sets
            ]
        )

    expected = old.shifted(features("task_01_colours"), features("task_02_shades"))
    torch.testing.assert_close(new.tasks[0].means, expected.tasks[0].means, rtol=1e-4, atol=1e-5)
    assert (new.tasks[0].means - old.tasks[0].means).abs().max() > 1e-3
    assert new.tasks[1].means.equal(old.tasks[1].means)


def test_kept_means_move_with_a_task_of_captions(
    run: Run, task_folders: tuple[str, str], tmp_path: Path
) -> None:
    tasks = (task_folders[0], f"captions:{write_pairs(tmp_path / 'pairs')}")
    old, new = (
        read_statistics(statistics_of(folder.latest)).tasks
        for folder in (
            run(str(drift), tasks=tasks, method="finetune", lr=1e-2, head_drift=drift)
            for drift in (None, "sdc")
        )
    )
    assert len(old) == len(new) == 1
    assert (new[0].means - old[0].means).abs().max() > 1e-3


def test_a_signal_during_a_save_between_two_tasks_ends_the_run_there(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = recovery.write_state

    def interrupted(path: Path, state: recovery.State) -> None:
        write(path, state)
        if state["in_task"] is None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(recovery, "write_state", interrupted)
    with pytest.raises(Stopped):
        run(method="finetune")
    folder = tmp_path / "logs" / "first"
    assert read_matrix(folder / "matrix.csv").tasks == ()
    monkeypatch.setattr(recovery, "write_state", write)
    again = sequence.run(resolve(read_config(folder / "args.yaml")), resume=folder)
    assert again is not None and again.matrix.tasks == ("colours", "shades")


def test_the_first_process_says_whether_a_run_is_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another one may not see the folder, and would wait for processes that have ended."""
    store = dist.HashStore()
    first, second = (Meeting(store, rank, 2, ("", "")) for rank in (0, 1))
    first.told_by_first("complete", True)
    monkeypatch.setattr("mulki.distributed.launch.launched", lambda: True)
    monkeypatch.setattr("mulki.distributed.launch.meeting", lambda: second)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sequence.run(resolve({}), resume=tmp_path / "elsewhere") is None


def test_a_warm_up_that_is_longer_than_a_task_is_told(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mulki"):
        run(method="finetune", warmup=9)
    assert caplog.text.count("--warmup 9: a task of ") == 1


def test_a_checkpoint_never_stands_beside_statistics_of_an_earlier_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the process ends between the two: what is missing is told, what is old is not."""
    lacking = []

    def publishes(model: Any, weights: Path, folder: Path, *rest: Any) -> None:
        before = statistics_of(folder).exists()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(os, "link", full)
            patch.setattr(shutil, "copyfile", full)
            publish(model, weights, folder, *rest)
        assert statistics_of(folder).exists() == before
        publish(model, weights, folder, *rest)
        lacking.append((before, statistics_of(folder).exists()))

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("mulki.train.sequence.publish", publishes)
    latest = run(method="finetune").latest
    assert lacking == [(False, False), (True, False)] and statistics_of(latest).exists()
