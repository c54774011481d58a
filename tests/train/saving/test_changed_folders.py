"""Runs that go on after their folder, their images, the machine or the clock has changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mulki.data.decoding import BadImage
from mulki.distributed.world import World
from mulki.errors import InputError
from mulki.train.display.progress import RunProgress
from mulki.train.learning.inputs import StepReport
from mulki.train.saving.recovery import read_save
from tests.train.run_helpers import Run, check_same, resumed, weights
from tests.train_helpers import same_state

# By how much weights may differ where sums are added in another order. Attention does not depend on
# the bias of its keys, whose gradient is rounding alone; AdamW divides it by its own size, so that
# each of the last three steps is one of the learning rate.
ROUNDED, OF_KEYS = 1e-5, 3e-3


@pytest.fixture(scope="module")
def whole(stopped_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run that was stopped comes to where nothing has changed."""
    return resumed(Path(shutil.copytree(stopped_once, tmp_path_factory.mktemp("w") / "first"))).path


def test_damaged_answers_are_told_and_change_nothing_else(
    stopped: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (file,) = (stopped / "answers").glob("01_*.npz")
    file.write_bytes(file.read_bytes()[:-30])
    resumed(stopped)
    assert re.search(r"01_\w+\.npz: .*; the run goes on, and its page lacks all", caplog.text)
    for task in ("task_01*", "task_02*"):
        assert same_state(weights(stopped, task), weights(whole, task))


def test_a_folder_that_was_moved_and_renamed(stopped: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = stopped.rename(tmp_path / "elsewhere" / "other name")
    resumed(moved)
    check_same(moved, whole)
    assert not stopped.exists()
    assert json.loads((moved / "summary.json").read_text())["name"] == "other name"


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda image: image.unlink(), "the tasks are not those that .*stopped began with"),
        (lambda image: image.write_bytes(image.read_bytes()[:200]), r"train/dark/0\.png: "),
    ],
    ids=["deleted", "cut"],
)
def test_an_image_that_is_lost_between_two_tasks(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    task_folders: tuple[str, str],
    change: Callable[[Path], object],
    again: str,
) -> None:
    """One that was changed while the run stood still is in `test_resuming.py`."""
    tasks = tuple(str(shutil.copytree(each, tmp_path / Path(each).name)) for each in task_folders)
    options = {"method": "finetune", "tasks": tasks}
    whole = run("whole", **options)
    image = Path(tasks[1], "train", "dark", "0.png")
    kept = image.read_bytes()
    real, steps = RunProgress.step, 0

    def step(self: RunProgress, report: StepReport) -> None:
        nonlocal steps
        real(self, report)
        steps += 1
        if steps == 4:  # the last one of the first task
            change(image)

    with monkeypatch.context() as patch, pytest.raises(BadImage, match=r"train/dark/0\.png: "):
        patch.setattr(RunProgress, "step", step)
        run("stopped", **options)
    folder = tmp_path / "logs" / "stopped"
    with pytest.raises(InputError, match=again):
        resumed(folder)
    image.write_bytes(kept)
    check_same(resumed(folder).path, whole.path)


def test_file_times_in_the_future_and_a_clock_that_was_set_back(
    stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    century = 100 * 365 * 86400
    for file in [stopped, *stopped.rglob("*")]:
        os.utime(file, (time.time() + century,) * 2)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - century / 5)
    resumed(stopped)
    check_same(stopped, whole)


@pytest.mark.parametrize(
    ("name", "before"), [("torch", "2.11.0+cu126"), ("threads", 64), ("cpu", "another")]
)
def test_a_save_of_another_machine_is_told(
    stopped: Path, whole: Path, caplog: pytest.LogCaptureFixture, name: str, before: object
) -> None:
    known = json.loads((stopped / "env.json").read_text())
    (stopped / "env.json").write_text(json.dumps(known | {name: before}))
    resumed(stopped)
    told = rf"rounded otherwise from here on \({name}: .*, before {re.escape(str(before))}\)"
    assert re.search(told, caplog.text) and re.search(told, (stopped / "out.log").read_text())
    check_same(stopped, whole)


def test_another_number_of_threads(
    stopped: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        resumed(stopped)
    finally:
        torch.set_num_threads(before)
    assert f"threads: {before + 1}, before {before}" in caplog.text
    found = weights(stopped)
    for name, value in weights(whole).items():
        atol = OF_KEYS if name.endswith("in_proj_bias") else ROUNDED
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


def test_more_processes_are_refused(stopped: Path) -> None:
    """Fewer are in `tests/distributed/test_launch.py`."""
    with pytest.raises(InputError, match="a run on 1 processes, these are 2; start as many"):
        read_save(stopped, World(0, 2))
