"""WiSE-FT: cross-entropy, and weights that are mixed with a base at the end of a task."""

from __future__ import annotations

import pytest

from mulki.methods.finetune import Finetune
from mulki.methods.wise_ft import WiseFT
from tests.methods.method_helpers import add, start


def learn(method, weights, index, amount):
    start(method, weights, index=index)
    add(weights, amount)
    method.after_step(1)
    method.end_task()


def test_its_losses_are_those_of_finetune(student, target):
    losses = WiseFT(WiseFT.Options(label_smoothing=0.1)).losses(student, (), target)
    assert losses == Finetune(Finetune.Options(label_smoothing=0.1)).losses(student, (), target)


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
