"""The bundled pack and start model: sound, and far enough above chance to have much to lose."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.embedded.pack import check_pack
from mulki.clip import models
from mulki.clip.evaluation import Evaluator
from mulki.data import load_sequence
from mulki.data.embedded import embedded_root
from mulki.data.loader import batches
from mulki.data.shards import open_pack
from mulki.runs.metrics import read_matrix

TASKS = {"digits": 10, "animals": 10, "letters": 26, "clipart": 10, "emoji": 7, "flags": 200}


@pytest.mark.long
def test_the_pack_is_what_its_index_says() -> None:
    assert check_pack.check(embedded_root()) == []


@pytest.mark.parametrize("order", ["I", "II", "III", "IV"])
def test_every_order_holds_the_six_tasks(order: str) -> None:
    tasks = load_sequence(["embedded"], order)
    assert sorted(task.name for task in tasks) == sorted(TASKS)
    for task in tasks:
        assert len(task.classes) >= TASKS[task.name]
        assert len(task.test) >= 300
    if order == "I":
        assert [task.name for task in tasks] == list(TASKS)


def test_no_two_orders_begin_or_end_alike() -> None:
    orders = open_pack(embedded_root()).orders
    # Its packages are not needed to read it.
    script = Path(check_pack.__file__).with_name("make_pack.py").read_text(encoding="utf-8")
    (written,) = re.findall(r"^ORDERS = (\{.*?^\})", script, re.MULTILINE | re.DOTALL)
    assert orders == {order: tuple(names) for order, names in ast.literal_eval(written).items()}
    assert len({names[0] for names in orders.values()}) == len(orders) == 4
    assert len({names[-1] for names in orders.values()}) == 4


def test_files_stay_small() -> None:
    files = [path for path in embedded_root().rglob("*") if path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 20 * 2**20
    weights = embedded_root() / "mulki-mini" / "open_clip_model.safetensors"
    assert weights.stat().st_size <= 12 * 2**20


@pytest.mark.long
def test_the_start_model_is_well_above_chance_on_every_task() -> None:
    model = models.load(models.BUNDLED)
    tasks = load_sequence(["embedded"])
    loaders = [batches(task.test, model.preprocess, 256, shuffle=False, seed=0) for task in tasks]
    evaluator = Evaluator(model, tasks, loaders)
    for number, task in enumerate(tasks):
        chance = 100 / len(task.classes)
        accuracy, _ = evaluator.accuracy(number)
        assert accuracy >= max(2 * chance, chance + 5), task.name


@pytest.mark.long
def test_the_quick_preset_learns_all_six_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mulki", "run", "embedded", "--preset", "quick"]
    command += ["--logs", str(tmp_path), "--name", "first"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "first"
    assert str(folder) in done.stdout.splitlines()[-1] and "Transfer" in done.stdout
    matrix = read_matrix(folder / "matrix.csv")
    assert matrix.tasks == tuple(TASKS) and matrix.zero_shot is not None
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert len(list((folder / "checkpoints").glob("task_*.safetensors"))) == len(TASKS)
