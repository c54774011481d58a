from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from mulki.answers import read_answers
from mulki.engine import recovery, sequence
from mulki.engine.config import read_config, resolve
from mulki.engine.meeting import Meeting
from mulki.engine.progress import RunProgress
from mulki.engine.resuming import read_save, restart_of
from mulki.environment import launcher
from mulki.errors import InputError
from mulki.evaluations import read_evaluations
from mulki.results import RunFolder
from mulki.world import World
from tests import ROOT
from tests.engine.run_helpers import SHORT, Run, weights
from tests.engine_helpers import COLOURS, SHADES, same_state, write_split

# Options under which every kind of state matters.
CASES: dict[str, dict[str, Any]] = {
    "mulki": {"method": "mulki", "we_every": 2, "alpha": 0.8, "l2": 0.1, "anchors": "both",
              "anchors_per_step": 3, "augment": "crop"},
    "learnable": {"method": "mulki", "prototype_update": "learnable", "grad_clip_norm": 1.0},
    "words": {"method": "mulki", "anchors": "vocabulary", "anchor_texts": "student",
              "anchors_per_step": 4, "lock_text": True},
    "lwf": {"method": "lwf", "warmup": 2},
    "muon": {"method": "finetune", "opt": "muon"},
    "snd": {"method": "snd", "reference": "current", "reference_batch_size": 4},
    "zscl": {"method": "zscl", "reference": "current", "we_every": 2},
    "wise_ft": {"method": "wise_ft", "wise_base": "zero_shot"},
    "original": {"method": "mulki", "original": "tiny-vit"},
}  # fmt: skip


def resumed(folder: Path) -> RunFolder:
    done = sequence.run(resolve(read_config(folder / "args.yaml")), resume=folder)
    assert done is not None
    return done


def results_of(folder: Path) -> Any:
    lines = [
        (e.step, e.after_task, e.eval_dataset, e.metric, e.value, e.n)
        for e in read_evaluations(folder / "results.jsonl")
    ]
    answers = {
        (row, name): each.own.tolist()
        for row, by_name in read_answers(folder).items()
        for name, each in by_name.items()
    }
    summary = json.loads((folder / "summary.json").read_text())
    del summary["seconds"], summary["name"]
    return lines, answers, summary, (folder / "matrix.csv").read_text()


def check_same(one: Path, other: Path) -> None:
    assert results_of(one) == results_of(other)
    for task in ("task_01*", "task_02*"):
        assert same_state(weights(one, task), weights(other, task))
    assert not (one / "recovery").exists() and not list(one.rglob("*.tmp"))


def stop_at(patch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Raise an error after so many steps of a run."""
    real, seen = RunProgress.step, []

    def step(self: RunProgress, report: Any) -> None:
        real(self, report)
        seen.append(report)
        if len(seen) == number:
            raise error

    patch.setattr(RunProgress, "step", step)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stopped", [3, 7])
def test_a_stopped_run_ends_as_if_it_had_not_been(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str, stopped: int
) -> None:
    options = CASES[case]
    whole = run("whole", **options)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, stopped, RuntimeError("stop"))
        run("stopped", **options)
    # What a new process starts from is not what this one ends with.
    random.random(), np.random.rand(), torch.rand(3)
    check_same(resumed(tmp_path / "logs" / "stopped").path, whole.path)


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
        ("cut", "not a whole safetensors file"),
        ("matrix", "rows of results"),
        ("weights", "weights are not those"),
        ("processes", "3 processes, these are 1"),
        ("processes, no save", "3 processes, these are 1"),
    ],
)
def test_what_cannot_go_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str, said: str
) -> None:
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        stop_at(patch, 5, RuntimeError("stop"))
        run("first", method="finetune")
    folder = tmp_path / "logs" / "first"
    file = folder / "recovery" / recovery.FILE
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "matrix":
        rows = (folder / "matrix.csv").read_text().splitlines(keepends=True)
        (folder / "matrix.csv").write_text("".join(rows[:-1]))
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
    monkeypatch.setattr("mulki.trackers._installed", lambda name: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert resumed(folder).status == "complete"
    assert "no curves for wandb" in (folder / "out.log").read_text()


def test_what_torchrun_starts_again_finds_its_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    settings = resolve(read_config(run("first", method="zero_shot").path / "args.yaml"))
    assert restart_of(settings) is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert restart_of(settings) is None
    with pytest.raises(InputError, match="--name: got none beside --max-restarts"):
        restart_of(replace(settings, run=replace(settings.run, name=None)))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restart_of(settings) == (settings, tmp_path / "logs" / "first")
    # It goes on with the precision that it began with.
    automatic = replace(settings, run=replace(settings.run, precision="auto"))
    assert restart_of(automatic) == (settings, tmp_path / "logs" / "first")
    with pytest.raises(InputError, match="--lr: .*first is of a run with 0.001, this one has 1"):
        restart_of(replace(settings, run=replace(settings.run, lr=1.0)))
    # What had not got as far as a result starts again.
    assert restart_of(replace(settings, run=replace(settings.run, name="new"))) is None
    # A first result is on disk before the matrix is.
    (tmp_path / "logs" / "first" / "matrix.csv").unlink()
    assert restart_of(settings) == (settings, tmp_path / "logs" / "first")
    # A folder of another torchrun is nobody's to take.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "def")
    assert restart_of(settings) is None


def test_several_machines_agree_on_the_folder_to_go_on_with(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    settings = resolve(read_config(run("first", method="zero_shot").path / "args.yaml"))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr("mulki.engine.distributed.launched", lambda: True)
    ours, other = launcher(), "torchrun abc 1 on another"

    def found(words: list[tuple[int, str | None]], **options: Any) -> list[Any]:
        store, results = dist.HashStore(), []
        store.set_timeout(datetime.timedelta(seconds=10))
        for rank, logs in enumerate([settings.run.logs, "/elsewhere"]):
            met = Meeting(store, rank, 2, tuple(map(json.dumps, words)))
            monkeypatch.setattr("mulki.engine.distributed.meeting", lambda met=met: met)
            config = replace(settings.run, logs=logs, **options)
            try:
                results.append(restart_of(replace(settings, run=config)))
            except InputError as error:
                results.append(str(error))
        return results

    assert found([(0, ours), (0, other)]) == [None, None]
    # The first machine's torchrun has seen no failure; or another machine has the first process.
    for words in ([(0, ours), (1, other)], [(1, other), (0, ours)]):
        (_, here), (_, there) = found(words)
        assert (here, there) == (tmp_path / "logs" / "first", Path("/elsewhere/first"))
    assert found([(1, "torchrun def 2 on one"), (1, other)]) == [None, None]
    problems = found([(1, ours), (0, other)], lr=1.0)
    assert "--lr: " in problems[0] and problems[0] == problems[1]


def test_every_process_has_to_see_the_same_save(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="gone is not to be seen on .*all machines see it"):
        read_save(tmp_path / "gone", World(1, 2))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 3, RuntimeError("stop"))
        run("stopped")
    folder = tmp_path / "logs" / "stopped"
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(World, "agree", lambda *given, **facts: seen.append(facts))
    saved = recovery.hash_of_save(folder)
    resumed(folder)
    assert len(saved) == 64 and seen[0]["save (hash)"] == saved
    assert recovery.hash_of_save(folder) == "none"


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


# --- killed processes


@dataclass
class Killed:
    """The process of `killed_runs.py`."""

    process: subprocess.Popen[str]
    options: dict[str, Any]

    def run(
        self,
        name: str,
        *,
        resume: bool = False,
        events: int | None = None,
        after: float | None = None,
        sent: int = signal.SIGKILL,
    ) -> tuple[int, int]:
        """Exit status and number of events; the run gets the signal `sent` after some seconds."""
        assert self.process.stdin is not None and self.process.stdout is not None
        options = self.options | {"name": name}
        folder = str(Path(options["logs"]) / name) if resume else None
        asked = {"options": options, "resume": folder, "events": events}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):  # it has ended by then
                os.kill(child, sent)
        status, seen = map(int, self.process.stdout.readline().split())
        return status, seen

    def finish(self, name: str) -> Path:
        """Go on with a run, or start it again if it had not begun; returns its folder."""
        folder = Path(self.options["logs"]) / name
        begun = (folder / "summary.json").is_file() and (folder / "args.yaml").is_file()
        assert self.run(name, resume=begun)[0] == 0
        return folder


@pytest.fixture(scope="module")
def killed(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Killed]:
    logs = str(tmp_path_factory.mktemp("killed"))
    options = {**SHORT, **start_model, "tasks": list(task_folders), "logs": logs}
    # A locked text tower makes saves of kilobytes.
    options |= {"method": "mulki", "we_every": 2, "save_every": 1, "lock_text": True}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.killed_runs"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(options | {"name": "warm"}) + "\n")
    try:
        yield Killed(process, options)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def uninterrupted(killed: Killed) -> tuple[Path, float, int]:
    """The folder of a run that nothing stopped, its seconds, and its file-system events."""
    killed.run("first")
    started = time.monotonic()
    status, events = killed.run("whole")
    assert status == 0 and events > 100
    return Path(killed.options["logs"]) / "whole", time.monotonic() - started, events


needs_fork = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux")


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("trial", range(12))
def test_killed_at_a_random_moment(
    killed: Killed, uninterrupted: tuple[Path, float, int], trial: int
) -> None:
    folder, seconds, _ = uninterrupted
    moment = random.Random().uniform(0, 1.1 * seconds)
    print(f"killed after {moment:.4f} s")
    name = f"time-{trial}"
    assert killed.run(name, after=moment)[0] in (-signal.SIGKILL, 0)
    if (Path(killed.options["logs"]) / name / "matrix.csv").exists() and trial % 2:
        killed.run(name, resume=True, after=moment / 2)  # and once more
    killed.finish(name)
    check_same(folder.parent / name, folder)


def check_killed_at(killed: Killed, whole: Path, event: int) -> None:
    name = f"event-{event}"
    assert killed.run(name, events=event)[0] == -signal.SIGKILL
    killed.finish(name)
    check_same(whole.parent / name, whole)
    shutil.rmtree(whole.parent / name)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("trial", range(12))
def test_killed_at_a_file_system_event(
    killed: Killed, uninterrupted: tuple[Path, float, int], trial: int
) -> None:
    folder, _, events = uninterrupted
    number = random.Random().randint(trial * events // 12 + 1, (trial + 1) * events // 12)
    print(f"killed at event {number} of {events}")
    check_killed_at(killed, folder, number)


@needs_fork
@pytest.mark.long
def test_killed_at_every_file_system_event(
    killed: Killed, uninterrupted: tuple[Path, float, int]
) -> None:
    folder, _, events = uninterrupted
    for number in range(1, events + 1):
        print(f"killed at event {number} of {events}")
        check_killed_at(killed, folder, number)


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
    with pytest.raises(InputError, match="the tasks are not those that .* began with"):
        resumed(tmp_path / "logs" / "stopped")
    added.unlink()
    check_same(resumed(tmp_path / "logs" / "stopped").path, whole.path)
