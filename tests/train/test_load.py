"""Long sequences and wide tasks: what a run holds does not grow, and much of it at once works."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor, nn

from mulki.data import Task, dataset_task
from mulki.runs.folder import RunFolder
from mulki.runs.metrics import read_matrix
from mulki.train import sequence, task_learner
from mulki.train.config.run_config import resolve
from tests.sweeps import mostly_long
from tests.train.run_helpers import SHORT, Run
from tests.train_helpers import Calls


def coloured_task(name: str, classes: int, images: int = 2) -> Task:
    """A task of small images of one colour per class, which are in memory."""
    pictures = [
        (Image.new("RGB", (8, 8), (c % 256, c // 256, 7 * i)), c)
        for c in range(classes)
        for i in range(images)
    ]
    names = [f"{name} {number}" for number in range(classes)]
    return dataset_task(name, pictures, pictures[::images], classes=names)


def learn(tasks: list[Task], tmp_path: Path, model: dict[str, str], **options: Any) -> RunFolder:
    given = {**SHORT, **model, "iterations": 2, "logs": str(tmp_path), "name": "long", **options}
    settings = resolve({**given, "tasks": tuple(task.name for task in tasks)})
    return sequence.run(settings, tasks=tasks)


def tensors_alive() -> tuple[int, int]:
    """How many tensors there are, and the bytes of their memory."""
    gc.collect()
    memory: dict[int, int] = {}
    count = 0
    for item in gc.get_objects():
        # Tests that ran before may have left tensors without memory, of other types.
        if type(item) in (Tensor, nn.Parameter) and item.device.type == "cpu":
            count += 1
            memory[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return count, sum(memory.values())


@pytest.mark.parametrize("method", mostly_long(["mulki", "zscl"], "mulki"))
def test_a_task_leaves_nothing_behind(
    method: str,
    tmp_path: Path,
    start_model: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tasks of five classes: teachers, prototypes and caches go with their task."""
    found, work, number = [], [], 6
    plain = task_learner.learn_task
    calls = Calls(monkeypatch)

    def counted(*args: Any, **options: Any) -> int:
        found.append(tensors_alive())
        work.append(calls.total())
        return plain(*args, **options)

    monkeypatch.setattr(task_learner, "learn_task", counted)
    tasks = [coloured_task(f"task{i}", 5) for i in range(number)]
    reference = {"reference": "current"} if method == "zscl" else {}
    folder = learn(
        tasks,
        tmp_path,
        start_model,
        method=method,
        save_checkpoints=False,
        save_every=0,
        **reference,
    )
    assert read_matrix(folder.path / "matrix.csv").tasks == tuple(task.name for task in tasks)
    assert len(found) == number
    counts, memory = zip(*found, strict=True)
    # Of each task its class means and the counts of its classes are kept.
    counts = [count - 2 * place for place, count in enumerate(counts)]
    # The second task is the first with a previous model of its own.
    assert max(counts[2:]) <= counts[2] + 10, counts
    assert max(memory[2:]) <= memory[2] * 1.01, memory
    # Nor does a later task take longer: about as many images and texts are encoded for each.
    per_task = [
        [after - before for before, after in zip(*pair, strict=True)]
        for pair in itertools.pairwise(work[1:])
    ]
    images, texts = zip(*per_task, strict=True)
    assert max(images) <= 1.1 * images[0] and 0 < max(texts) <= 1.1 * texts[0], per_task


@pytest.mark.long
def test_four_thousand_classes_in_a_task(tmp_path: Path, start_model: dict[str, str]) -> None:
    task = coloured_task("wide", 4000, images=1)
    folder = learn([task], tmp_path, start_model, batch_size=64, save_every=0)
    assert folder.matrix.tasks == ("wide",)


def test_the_evaluation_batch_changes_no_result(run: Run) -> None:
    answers = [
        run(name=f"by-{size}", batch_size_eval=size, save_every=0).matrix.rows
        for size in (1, 4, 64)
    ]
    assert answers[0] == answers[1] == answers[2]
