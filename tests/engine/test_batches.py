from __future__ import annotations

from dataclasses import replace

from mulki.data import Task
from tests.engine.learn_helpers import CONFIG, Load, learn


def test_small_training_set_makes_whole_batches_of_itself(load_tiny: Load, task: Task) -> None:
    reports = learn(load_tiny(), task, config=replace(CONFIG, batch_size=64, iterations=2))
    assert [r.images for r in reports] == [18, 18]


def test_another_task_index_draws_another_order(load_tiny: Load, task: Task) -> None:
    losses = [
        [r.losses["ce_loss"] for r in learn(load_tiny(), task, index=index)] for index in (0, 0, 1)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
