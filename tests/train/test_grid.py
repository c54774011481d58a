from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from mulki.data import decoding
from mulki.errors import InputError
from mulki.runs.new_folder import RECOVERY
from mulki.runs.reading import read_json
from mulki.train import grid
from mulki.train.grid import Cell, plan, run_cells
from tests.train.run_helpers import SHORT, weights

Plan = Callable[..., list[Cell]]


@pytest.fixture
def planned(tmp_path: Path, start_model: dict[str, str], task_folders: tuple[str, str]) -> Plan:
    def go(seeds: Sequence[int] = (0, 1), methods: Sequence[str] = ("finetune",), **options: Any):
        given = {**SHORT, **start_model, "tasks": task_folders, "logs": str(tmp_path / "logs")}
        return plan({**given, **options}, methods=methods, orders=("I",), seeds=seeds)

    return go


def states(cells: Sequence[Cell]) -> list[str]:
    return [cell.state for cell in cells]


def test_what_is_complete_is_kept(planned: Plan, tmp_path: Path) -> None:
    cells = planned()
    assert states(cells) == ["new", "new"] and not (tmp_path / "logs").exists()
    run_cells(cells[:1])
    folder = tmp_path / "logs" / "grid" / "finetune-order_I-seed_0"
    before = (folder / "results.jsonl").read_bytes()
    again = planned(methods=("finetune", "lwf"), log_every_n_steps=1)
    assert states(again) == ["complete", "new", "new", "new"]
    assert again[0].folder == folder
    run_cells(again[:2])
    assert states(planned()) == ["complete", "complete"]
    assert (folder / "results.jsonl").read_bytes() == before


def test_what_was_stopped_goes_on(
    planned: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_cells(planned(seeds=(0,), name="whole"))
    real = grid.run

    def stopped(settings: Any, console: Any, resume: Any = None) -> None:
        from mulki.train.sequence import _Sequence

        def fails(self: Any, number: int, task: Any) -> None:
            if number == 2:
                raise InputError("no more")
            save(self, number, task)

        save = _Sequence._save
        with monkeypatch.context() as patch:
            patch.setattr(_Sequence, "_save", fails)
            real(settings, console, resume=resume)

    monkeypatch.setattr(grid, "run", stopped)
    with pytest.raises(InputError, match="no more"):
        run_cells(planned(seeds=(0,)))
    monkeypatch.setattr(grid, "run", real)
    (cell,) = planned(seeds=(0,))
    assert cell.state == "stopped" and (cell.folder / RECOVERY).is_dir()
    run_cells([cell])
    assert states(planned(seeds=(0,))) == ["complete"]
    one = weights(cell.folder)
    other = weights(tmp_path / "logs" / "whole" / cell.folder.name)
    assert all((one[name] == other[name]).all() for name in other)


def test_a_folder_of_other_options_is_refused(planned: Plan) -> None:
    run_cells(planned(seeds=(0,)))
    with pytest.raises(InputError, match="--lr: .* 0.001, .*0.01"):
        planned(lr=1e-2)
    with pytest.raises(InputError, match="--augment: "):
        planned(augment="crop")


def test_words_and_reference_images_are_for_the_methods_that_use_them(
    planned: Plan, tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("apple\npear\n")
    data = {"vocabulary": str(words), "reference": "current", "anchors_per_step": 2}
    cells = planned((0,), ("finetune", "lwf_vr", "zscl"), **data)
    used = {
        cell.settings.run.method: {
            name for name, value in data.items() if getattr(cell.settings.run, name) == value
        }
        for cell in cells
    }
    assert used == {
        "finetune": set(),
        "lwf_vr": {"vocabulary", "anchors_per_step"},
        "zscl": {"vocabulary", "reference"},
    }
    run_cells(cells[:2])
    assert [read_json(cell.folder / "summary.json")["uses"] for cell in cells[:2]] == [
        [], ["a vocabulary of words"]
    ]  # fmt: skip
    with pytest.raises(InputError, match="--reference: .*method finetune .* uses no reference"):
        planned((0,), ("finetune", "ewc"), **data)
    with pytest.raises(InputError, match="--anchors-per-step: .*method finetune"):
        planned((0,), ("finetune", "zscl"), reference="current", anchors_per_step="5")


def test_a_name_is_that_of_one_folder(planned: Plan) -> None:
    with pytest.raises(InputError, match="--name: got .*the name of one folder"):
        planned(name="../elsewhere")


def test_a_folder_of_something_else_is_refused(planned: Plan, tmp_path: Path) -> None:
    mine = tmp_path / "logs" / "grid" / "finetune-order_I-seed_1"
    mine.mkdir(parents=True)
    (mine / "mine").touch()
    with pytest.raises(InputError, match="finetune-order_I-seed_1"):
        planned()


def test_tasks_of_all_orders_are_looked_at_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='order "nine"'):
        plan({"logs": str(tmp_path)}, methods=("finetune",), orders=("I", "nine"), seeds=(0,))


def test_large_images_are_allowed_while_tasks_are_looked_at(
    planned: Plan, task_folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_max_pixels", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert len(planned(max_pixels=decoding.MAX_PIXELS)) == 2
    assert decoding.pixel_limit() == decoding.MAX_PIXELS


def test_long_orders_have_short_names_of_their_own() -> None:
    names = [
        ",".join(["aircraft", "caltech101", "cifar100", "dtd", "eurosat", last]) for last in "ab"
    ]
    short = [grid._short(name) for name in names]
    assert len(set(short)) == 2 and all(len(name) <= 40 for name in short)
    assert grid._short("II") == "II"
    assert grid._short("a_b,c") == "a_b_c"
    assert grid._short("猫,犬") != grid._short("犬,猫")


def test_a_run_folder_is_no_place_for_a_grid(planned: Plan, tmp_path: Path) -> None:
    (cell, *_) = planned()
    grid_folder = cell.folder.parent
    grid_folder.mkdir(parents=True)
    (grid_folder / "args.yaml").write_text("lr: 1.0\n")
    with pytest.raises(InputError, match="^--name: "):
        planned()


@pytest.mark.slow
def test_several_at_a_time(planned: Plan, tmp_path: Path) -> None:
    run_cells(planned(), jobs=2)
    assert states(planned()) == ["complete", "complete"]
    # As in this process.
    (alone,) = planned(seeds=(1,), name="alone")
    run_cells([alone])
    matrix = (tmp_path / "logs" / "grid" / alone.folder.name / "matrix.csv").read_bytes()
    assert matrix == (alone.folder / "matrix.csv").read_bytes()


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(grid, "cores", lambda: 8)
    found = [grid._environment(slot, 3, "cpu")["OMP_NUM_THREADS"] for slot in range(3)]
    assert found == ["2"] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert grid._environment(0, 2, "auto") == {}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed by SIGKILL \(out of memory\?\)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("os.kill(os.getpid(), 40)", "was killed by signal 40"),
        ("say('mulki: error: bad'); say('task 1 of 2'); sys.exit(2)", "bad"),
        ("say('task 1 of 2'); sys.exit(3)", "task 1 of 2, exit status 3"),
        ("sys.exit(3)", "exit status 3"),
    ],
)
def test_why_a_run_ended(
    planned: Plan, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    cells = planned(seeds=(0, 1, 2))
    head = "import os, signal, sys; say = lambda text: print(text, file=sys.stderr); "
    progress = "" if code.startswith("sys.exit") else "say('task 1 of 2, step 3'); "
    real = subprocess.Popen
    started: list[str] = []

    def instead(words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        started.append(" ".join(words))
        return real([sys.executable, "-c", head + progress + code], **options)

    monkeypatch.setattr(grid.subprocess, "Popen", instead)
    with pytest.raises(InputError, match=rf"-seed_\d: {said}"):
        run_cells(cells, jobs=2)
    assert started and not any("seed_2" in each for each in started)


def test_jobs_beside_torchrun_are_refused(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = planned()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="^--jobs: "):
        run_cells(cells, jobs=2, console=Console(quiet=True))


def test_children_end_with_the_grid(planned: Plan, tmp_path: Path) -> None:
    (cell, _) = planned()
    with pytest.raises(InputError, match="enough"), grid._children() as children:
        children[0] = child = grid._Child(cell, tmp_path, {})
        child.process.terminate()
        child.process.wait()
        child.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        started = time.monotonic()
        raise InputError("enough")
    assert child.process.returncode == -signal.SIGTERM
    assert time.monotonic() - started < 30
