from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mulki import methods
from mulki.train import costs
from mulki.train.config.run_config import resolve
from mulki.train.costs import Costs, measure
from mulki.train.learning import memory
from mulki.train.learning.inputs import Listeners, StepReport
from mulki.train.learning.memory import MicroBatch
from mulki.train.start.setup import prepared
from mulki.train.task_learner import TaskLearner
from tests.train.run_helpers import SHORT, Run, options_of, weights
from tests.train_helpers import write_pairs


@pytest.fixture
def measured(start_model: dict[str, str], task_folders: tuple[str, str], tmp_path: Path) -> Any:
    def go(**options: Any) -> Costs:
        given = {"tasks": task_folders, "logs": str(tmp_path / "plans")}
        merged = {**SHORT, **start_model, **given, **options}
        with prepared(resolve(merged), write=False) as setup:
            found = measure(setup)
        assert not (tmp_path / "plans").exists()
        return found

    return go


def test_what_is_measured_at_the_end_of_a_task_counts(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(training: Any, inputs: Any, count: int) -> dict[str, torch.Tensor]:
        time.sleep(0.02 * min(count, len(inputs.task.train)))
        return {name: torch.ones_like(p) for name, p in training.model.trainable().items()}

    monkeypatch.setattr("mulki.train.learning.learn.fisher_diagonal", slow)
    # Of 18 images, however few of them are looked at.
    found = measured(method="ewc", batch_size=2, fisher_images=100)
    assert found.tasks[0].learning > 0.02 * 18


@pytest.mark.parametrize("method", list(methods.available()))
def test_every_method_is_measured(measured: Any, method: str) -> None:
    found = measured(method=method, **options_of(method))
    trains = methods.get(method).trains
    cls = methods.get(method)
    teachers = cls(cls.Options()).needs.teachers
    assert [each.name for each in found.tasks] == ["colours", "shades"]
    assert [each.steps for each in found.tasks] == ([4, 4] if trains else [0, 0])
    assert (found.tasks[0].train, found.tasks[0].test, found.tasks[0].classes) == (18, 15, 3)
    learning = sum(each.learning for each in found.tasks)
    testing = sum(each.testing for each in found.tasks)
    again = sum(each.testing_again for each in found.tasks)
    assert found.seconds == pytest.approx(learning + testing + (2 * again if trains else 0))
    # Without training there are the class statistics.
    assert all(each.testing > 0 for each in found.tasks) and learning > 0
    # Whatever is copied or trained is counted in the model's own size.
    own = 4 * found.parameters
    assert found.models >= own * (1 + len(teachers)) * 0.9 and (found.training > 0) == trains
    assert (found.teacher_features > 0) == bool(teachers)
    assert (found.image is not None) == trains


@pytest.mark.parametrize("method", ["zero_shot", "finetune"])
def test_without_a_head_training_alone_is_learning(measured: Any, method: str) -> None:
    found = measured(method=method, head=False)
    assert (sum(each.learning for each in found.tasks) > 0) == (method == "finetune")


def test_features_of_teachers_are_those_of_what_they_see(measured: Any, tmp_path: Path) -> None:
    pairs = [f"captions:{write_pairs(tmp_path / name, name)}" for name in ("flags", "animals")]
    # By one teacher 18 training images of the larger task; by two these, or as many made of them,
    # or both, or 18 pairs.
    assert measured(method="lwf").teacher_features == 18 * 32 * 4
    for options, rows in (
        ({"hold_on": "task"}, 18),
        ({}, 18),
        ({"hold_on": "both"}, 36),
        ({"tasks": pairs}, 36),
    ):
        found = measured(method="mulki", **options)
        assert found.teacher_features == 2 * rows * 32 * 4, options


def test_what_is_stored_is_what_a_run_stores(run: Run, measured: Any) -> None:
    file = weights(run(method="finetune"))
    found = measured(method="finetune")
    assert found.stored == sum(value.numel() for value in file.values())
    assert found.stored_bytes == sum(value.nbytes for value in file.values())
    assert measured(method="finetune", save_checkpoints=False).stored == 0


def test_seconds_are_those_of_as_many_steps(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps on new images of 2, 3 and 9 s, then three of 0.5 s: medians are 3 and 0.5."""

    def learn(self: TaskLearner, index: int, task: Any, listeners: Listeners, config: Any) -> int:
        once = max(len(task.train) // 6, 1)
        assert config.iterations == once + 3 and config.micro_batch == "auto"
        for number, seconds in enumerate([2.0, 3.0, 9.0][:once] + [0.5, 0.5, 0.7], start=1):
            listeners.step(StepReport(number, {}, 0.1, 6, seconds))
        assert listeners.micro_batch is not None
        listeners.micro_batch(MicroBatch(6, 7, 1000, 70 + index))
        return config.iterations

    monkeypatch.setattr(TaskLearner, "learn", learn)
    # What is really computed here takes no time.
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    found = measured(method="finetune", iterations=100)
    one, two = found.tasks  # 18 and 12 training images, in batches of 6
    assert (one.first_step, one.later_step) == (3.0, 0.5)
    assert one.learning == pytest.approx(3 * 3.0 + 97 * 0.5)
    assert two.learning == pytest.approx(2 * 2.5 + 98 * 0.5)
    assert (found.largest, found.image, found.batch) == (70, 7, 6)
    # Images that are another view each time are new each time.
    random = measured(method="finetune", iterations=100, augment="crop")
    assert random.tasks[0].learning == pytest.approx(100 * 0.5)


def test_the_largest_micro_batch_is_of_the_free_memory(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = measured(method="finetune")
    assert plenty.largest is not None and plenty.largest > 6
    assert plenty.image is not None
    free = plenty.training + 2 * 3 * plenty.image
    for module in (memory, costs):
        monkeypatch.setattr(module, "free_memory", lambda device: free)
    little = measured(method="finetune")
    assert little.free == free and little.largest is not None and little.largest <= 3
