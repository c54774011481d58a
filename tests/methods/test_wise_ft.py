"""WiSE-FT: cross-entropy, and weights that are mixed with a base at the end of a task."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mulki.methods.wise_ft import WiseFT
from tests.methods.method_helpers import add, start
from tests.ranks import run_ranks


def learn(method, weights, index, amount):
    start(method, weights, index=index)
    add(weights, amount)
    method.after_step(1)
    method.end_task()


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        # theta_0 = 1; after each task 0.25 of the base and 0.75 of the fine-tuned weights.
        ("previous", (1 + 0.75 * 4, 1 + 0.75 * 4 + 0.75 * 4)),
        ("zero_shot", (1 + 0.75 * 4, 0.25 * 1 + 0.75 * (4 + 4))),
    ],
)
def test_two_tasks_by_the_formula(weights, base, expected):
    method = WiseFT(WiseFT.Options(alpha=0.75, wise_base=base))
    live = weights["a"]
    for index, wanted in enumerate(expected):
        learn(method, weights, index, 4.0)
        assert weights["a"] is live and live.tolist() == [wanted] * 3


def test_a_new_sequence_has_a_new_original_model(weights):
    method = WiseFT(WiseFT.Options(alpha=0.5, wise_base="zero_shot"))
    learn(method, weights, 0, 2.0)
    assert weights["b"] == 1
    learn(method, weights, 0, 2.0)
    assert weights["b"] == 2


def test_with_an_alpha_of_one_it_is_finetune(weights):
    learn(WiseFT(WiseFT.Options(alpha=1.0, wise_base="zero_shot")), weights, 0, 1.0)
    assert weights["a"].tolist() == [2, 2, 2]


def test_the_base_is_the_previous_model_by_default_as_in_the_benchmark():
    options = WiseFT.Options()
    assert (options.alpha, options.wise_base) == (0.8, "previous")


def whole(value):
    """As a save holds it."""
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value


def go_on_sharded(rank, world):
    mesh = init_device_mesh("cpu", (world,))

    def sharded(value):
        return {"a": distribute_tensor(torch.full((3,), value), mesh, [Shard(0)])}

    options = WiseFT.Options(alpha=0.75, wise_base="zero_shot")
    method, again = WiseFT(options), WiseFT(options)
    start(method, sharded(1.0), index=0)
    saved = whole(method.state_dict())
    # As a run that goes on: before the task is started, and after it.
    again.load_state_dict(saved, strict=False)
    weights = sharded(8.0)
    start(again, weights, index=1)
    again.load_state_dict(saved)
    again.end_task()
    return weights["a"].full_tensor()


def test_the_original_model_of_a_sharded_run_that_goes_on():
    for found in run_ranks(2, go_on_sharded):
        assert found.tolist() == [0.25 * 1 + 0.75 * 8] * 3
