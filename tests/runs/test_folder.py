from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mulki.errors import InputError
from mulki.runs import trackers
from mulki.runs.answers import Answers
from mulki.runs.folder import RunFolder
from mulki.runs.metrics import DEFINITIONS, ZERO_SHOT, AccuracyMatrix, read_matrix
from mulki.runs.reading import read_folder
from mulki.runs.results import read_evaluations
from tests import ROOT
from tests.runs.folder_helpers import COLUMNS, evaluate, make, row, summary_of


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulki.runs.trackers._installed", lambda name: False)


def test_a_whole_run(tmp_path: Path, without_tensorboard: None) -> None:
    with make(tmp_path, hashes={"weights": "abc", "splits": {"digits": "def"}}) as run:
        evaluate(run, ZERO_SHOT, step=0)
        run.add_row(ZERO_SHOT, row(10, 20, 30))
        logging.getLogger("mulki.train").info("learning digits")
        run.add_row("digits", row(11, 80, 31))
        run.add_row("letters", row(70, 60, 32))

    assert {path.name for path in run.path.iterdir()} == {
        "args.yaml",
        "env.json",
        "matrix.csv",
        "out.log",
        "results.jsonl",
        "summary.json",
    }
    matrix = read_matrix(run.path / "matrix.csv")
    assert matrix == run.matrix
    assert matrix.tasks == ("digits", "letters")

    summary = summary_of(run.path)
    assert summary["status"] == "complete"
    assert (summary["method"], summary["order"], summary["seed"]) == ("mulki", "I", 3)
    assert summary["uses"] == []
    assert summary["tasks"] == ["digits", "letters"]
    assert summary["columns"] == list(COLUMNS)
    assert summary["definitions"] == DEFINITIONS
    assert summary["test_images"] == {"digits": 600}
    assert summary["metrics"] == matrix.metrics().to_dict()
    assert summary["metrics"] == {
        "transfer": 11.0,
        "average": (80 + 11 + 60 + 70) / 4,
        "last": 65.0,
        "forgetting": 20.0,
        "bwt": -20.0,
    }
    assert summary["zero_shot_metrics"]["average"] == 15.0
    assert 0 <= summary["seconds"] < 60

    log = (run.path / "out.log").read_text()
    assert "INFO mulki.train: learning digits" in log
    assert json.loads((run.path / "env.json").read_text())["hashes"] == {
        "weights": "abc",
        "splits": {"digits": "def"},
    }


class Precision(Enum):
    AMP = "amp_bf16"


def test_the_configuration_can_be_read_back_without_this_package(tmp_path: Path) -> None:
    config = {
        "data_root": Path("data") / "x",
        "betas": (0.9, 0.98),
        "precision": Precision.AMP,
        "name": "täsk",
        "stages": {"eliciting": {"momentum": 0.9}},
        "limit": None,
    }
    run = make(tmp_path, config=config)
    text = (run.path / "args.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {
        "data_root": os.path.join("data", "x"),
        "betas": [0.9, 0.98],
        "precision": "amp_bf16",
        "name": "täsk",
        "stages": {"eliciting": {"momentum": 0.9}},
        "limit": None,
    }
    assert list(yaml.safe_load(text)) == list(config)


def test_evaluations_are_on_disk_at_once_and_read_back(tmp_path: Path) -> None:
    run = make(tmp_path, config={"model": "RN50"})
    path = run.path / "results.jsonl"
    first = evaluate(run, ZERO_SHOT, 100 / 3, step=0)
    assert read_evaluations(path) == [first]
    second = evaluate(run, "digits", 75, metric="acc5", eval_dataset="letters")
    assert read_evaluations(path) == [first, second]
    assert json.loads(path.read_text().splitlines()[0]) == {
        "run": "first",
        "order": "I",
        "seed": 3,
        "step": 0,
        "after_task": "zero-shot",
        "eval_dataset": "digits",
        "metric": "acc1",
        "value": 100 / 3,
        "n": 600,
        "seconds": 1.5,
        "method": "mulki",
        "model": "RN50",
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    run = make(tmp_path)
    with pytest.raises(InputError, match='acc1 on "digits" after "flags"'):
        evaluate(run, "flags", value)
    assert not (run.path / "results.jsonl").exists()


def test_numbers_of_torch_and_numpy_are_accepted(tmp_path: Path) -> None:
    run = make(tmp_path)
    number: Any = torch.tensor
    evaluate(run, "digits", number(50.0), n=number(4), seconds=number(1.0))
    run.add_row("digits", {name: number(12.5) for name in COLUMNS})
    assert read_evaluations(run.path / "results.jsonl")[0].value == 50.0
    assert read_matrix(run.path / "matrix.csv").rows == ((12.5,) * 3,)


def test_a_refused_row_changes_nothing(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.add_row("digits", row(1, 2, 3))
    before = run.matrix, (run.path / "matrix.csv").read_text(), summary_of(run.path)
    for after, values in [("digits", row(1, 2, 3)), ("flags", row(1, 2, 101)), ("flags", {})]:
        with pytest.raises(InputError):
            run.add_row(after, values)
    assert (run.matrix, (run.path / "matrix.csv").read_text(), summary_of(run.path)) == before


def test_metrics_of_the_file_are_those_of_the_run(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.add_row("digits", row(100 / 7, 100 / 3, 100 / 9))
    run.add_row("letters", row(200 / 7, 200 / 3, 200 / 9))
    assert read_matrix(run.path / "matrix.csv") == run.matrix
    assert summary_of(run.path)["metrics"] == run.matrix.metrics().to_dict()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_exception_leaves_an_interrupted_run(
    tmp_path: Path, without_tensorboard: None, error: BaseException
) -> None:
    with pytest.raises(type(error)), make(tmp_path) as run:
        run.add_row("digits", row(1, 2, 3))
        raise error
    assert summary_of(run.path)["status"] == "interrupted"
    assert summary_of(run.path)["tasks"] == ["digits"]
    log = (run.path / "out.log").read_text()
    assert f"run stopped by {type(error).__name__}" in log
    # A traceback helps with a failure and is noise after Ctrl-C.
    assert ("Traceback" in log) == isinstance(error, RuntimeError)


def test_an_exception_before_the_first_evaluation(
    tmp_path: Path, without_tensorboard: None
) -> None:
    with pytest.raises(InputError, match="no such task"), make(tmp_path) as run:
        raise InputError("no such task")
    assert summary_of(run.path)["status"] == "interrupted"


def test_a_failure_after_the_end_takes_nothing_back(
    tmp_path: Path, without_tensorboard: None
) -> None:
    with pytest.raises(BrokenPipeError), make(tmp_path) as run:
        run.add_row("digits", row(1, 2, 3))
        run.finish()
        raise BrokenPipeError
    assert summary_of(run.path)["status"] == "complete"
    assert RunFolder.open(run.path).status == "complete"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_run_can_be_read_and_resumed(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from mulki.runs.folder import RunFolder
run = RunFolder.create(sys.argv[1], "first", method="mulki", order="I", seed=3,
                       columns=("letters", "digits", "flags"), config={})
with run:
    run.record("digits", "digits", {"acc1": (2.0, 9)}, seconds=1.0, step=5)
    run.add_row("digits", {"letters": 1.0, "digits": 2.0, "flags": 3.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environ, timeout=120)
    assert done.returncode == -signal.SIGKILL

    path = tmp_path / "first"
    assert not [name for name in os.listdir(path) if name.endswith(".tmp")]
    assert summary_of(path)["status"] == "running"  # a process that is killed cannot say so
    assert read_folder(path).status == "interrupted"
    results = path / "results.jsonl"
    with results.open("a") as stream:
        stream.write('{"run": "fir')

    run = RunFolder.open(path)
    assert (run.name, run.method, run.order, run.seed) == ("first", "mulki", "I", 3)
    assert run.matrix == AccuracyMatrix(COLUMNS, ("digits",), ((1.0, 2.0, 3.0),))
    evaluate(run, "flags")
    assert [line.after_task for line in read_evaluations(results)] == ["digits", "flags"]
    run.add_row("flags", row(4, 5, 6))
    run.finish()
    assert summary_of(path)["status"] == "complete"
    assert summary_of(path)["tasks"] == ["digits", "flags"]
    assert summary_of(path)["test_images"] == {"digits": 600}


def test_resuming_before_the_first_row_and_after_a_stale_summary(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert RunFolder.open(run.path).matrix == AccuracyMatrix(COLUMNS)
    stale = (run.path / "summary.json").read_text()
    run.add_row(ZERO_SHOT, row(1, 2, 3))
    (run.path / "summary.json").write_text(stale)
    assert RunFolder.open(run.path).matrix == run.matrix


def test_a_run_that_is_opened_from_inside_its_folder_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path)
    monkeypatch.chdir(run.path)
    again = RunFolder.open(".")
    again.finish()
    assert again.name == run.name == summary_of(run.path)["name"]


def test_class_incremental_accuracies_outlast_a_resumed_run(tmp_path: Path) -> None:
    run = make(tmp_path, columns=("a", "b"))
    half, none = np.array([True, False, False]), np.zeros(2, dtype=bool)
    rows = {
        ZERO_SHOT: {"a": Answers(half), "b": Answers(none)},
        "a": {"a": Answers(half, half), "b": Answers(none)},
        "b": {"a": Answers(half, half), "b": Answers(~none, ~none)},
    }
    for step, (name, answers) in enumerate(rows.items()):
        if step == 2:
            run = RunFolder.open(run.path)
        run.add_answers(name, answers, seconds={"a": 1.5, "b": 2.0}, step=step)
    assert summary_of(run.path)["class_incremental"] == {
        "after": {"a": 33.3333, "b": 60.0}, "average": (33.3333 + 60) / 2, "last": 60.0
    }  # fmt: skip
    assert summary_of(run.path)["test_images"] == {"a": 3, "b": 2}
    last = read_evaluations(run.path / "results.jsonl")[-1]
    assert (last.metric, last.eval_dataset, last.n) == ("acc1_seen", "all-seen", 5)
    assert (last.value, last.seconds, last.step) == (60.0, 3.5, 2)
    # A line whose row was never written does not count, and is removed.
    lines = (run.path / "results.jsonl").read_text()
    evaluate(run, "c", 10, metric="acc1_seen", eval_dataset="all-seen")
    assert list(RunFolder.open(run.path).class_incremental.after) == ["a", "b"]
    assert (run.path / "results.jsonl").read_text() == lines


def test_seconds_add_up_over_a_resumed_run(tmp_path: Path) -> None:
    run = make(tmp_path)
    summary = summary_of(run.path)
    (run.path / "summary.json").write_text(json.dumps({**summary, "seconds": 1000.0}))
    RunFolder.open(run.path).add_row(ZERO_SHOT, row(1, 2, 3))
    assert 1000.0 <= summary_of(run.path)["seconds"] < 1060.0


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"method": "x"}'])
def test_opening_what_is_no_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InputError, match="not the folder of a run"):
        RunFolder.open(tmp_path)


def test_curves_go_to_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []
    closed: list[str] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

        def close(self) -> None:
            closed.append(self.folder)

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr("mulki.runs.trackers._installed", lambda name: name == "tensorboard")
    with make(tmp_path) as run:
        run.scalars({"loss": 0.5}, 1)
        evaluate(run, "digits", 80)
        run.add_row(ZERO_SHOT, row(1, 2, 3))
        run.add_row("digits", row(1, 80, 3))
    assert written == [
        ("loss", 0.5, 1),
        ("digits/acc1", 80.0, 5),
        ("val/digits-zeroshot-val-top1", 0.8, 5),
        ("metrics/average", 80.0, 1),
        ("metrics/last", 80.0, 1),
    ]
    assert closed == [str(run.path / "tensorboard")]
    run.scalars({"loss": 0.5}, 2)
    assert len(written) == 5


def test_trackers_do_not_hide_the_error_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, *given: object) -> None:
            pass

        def close(self) -> None:
            raise OSError("no space left")

    monkeypatch.setitem(trackers._KINDS, "wandb", Failing)  # type: ignore[arg-type]
    before = list(logging.getLogger("mulki").handlers)
    config = {"report_to": ["wandb"]}
    with pytest.raises(ValueError, match="mine"), make(tmp_path, config=config) as run:
        raise ValueError("mine")
    assert logging.getLogger("mulki").handlers == before
    assert "no more curves for wandb" in (run.path / "out.log").read_text()
    unknown = make(tmp_path, "second", config={"report_to": ["wandbb"]})
    with pytest.raises(InputError, match="--report-to"), unknown:
        pass
    assert logging.getLogger("mulki").handlers == before


def test_a_run_that_reports_to_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulki.runs.trackers._installed", lambda name: True)
    with make(tmp_path, config={"report_to": ["none"]}) as run:
        run.scalars({"loss": 0.5}, 1)
    assert not (run.path / "tensorboard").exists()


def test_a_run_that_goes_on_is_running_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path) as run:
        assert summary_of(run.path)["status"] == "running"
        raise KeyboardInterrupt
    assert summary_of(run.path)["status"] == "interrupted"
    run.release()
    with RunFolder.open(run.path) as again:
        assert summary_of(run.path)["status"] == "running"
    assert again.status == summary_of(run.path)["status"] == "complete"


@pytest.mark.parametrize(
    ("index", "task", "name"),
    [
        (1, "Aircraft", "task_01_aircraft.safetensors"),
        (3, "DTD", "task_03_dtd.safetensors"),
        (12, "clip art/by category", "task_12_clip_art_by_category.safetensors"),
        (2, "../Vögel", "task_02_vogel.safetensors"),
        (2, "花", "task_02_unnamed.safetensors"),
        (2, 255 * "a", f"task_02_{100 * 'a'}.safetensors"),
    ],
)
def test_checkpoint_paths(tmp_path: Path, index: int, task: str, name: str) -> None:
    run = make(tmp_path)
    path = run.checkpoint_path(index, task)
    assert path == run.path / "checkpoints" / name
    assert path.parent.is_dir()
    assert run.latest == run.path / "checkpoints" / "latest"


def test_reading_results_imports_neither_torch_nor_open_clip() -> None:
    # The package's own __init__ may import torch, so the modules are loaded below a bare package.
    script = f"""
import sys, types
package = types.ModuleType("mulki")
package.__path__ = [{str(ROOT / "mulki")!r}]
sys.modules["mulki"] = package
import mulki.runs.folder
print([name for name in ("torch", "open_clip", "rich", "jinja2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_what_was_used_is_kept(tmp_path: Path) -> None:
    run = make(tmp_path, uses=("reference images",))
    assert summary_of(run.path)["uses"] == ["reference images"]
    again = RunFolder.open(run.path)
    again.finish()
    assert summary_of(run.path)["uses"] == ["reference images"]
    old = summary_of(run.path)
    del old["uses"]
    (run.path / "summary.json").write_text(json.dumps(old))
    assert RunFolder.open(run.path).uses == ()
