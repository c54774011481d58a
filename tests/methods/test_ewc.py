"""EWC: cross-entropy, and a penalty weighted by the Fisher information of earlier tasks."""

from __future__ import annotations

import torch

from mulki.methods import Needs
from mulki.methods.ewc import EWC
from tests.methods.method_helpers import add, start


def fisher(a, b):
    return {"a": torch.tensor(a), "b": torch.tensor(b)}


def test_three_tasks_by_the_formula(weights):
    method = EWC(EWC.Options(ewc_lambda=3.0, ewc_decay=0.5, fisher_images=9))
    assert method.needs == Needs(fisher=9)
    start(method, weights, index=0)
    add(weights, 1.0)
    assert method.penalties() == {}
    method.keep_fisher(fisher([1.0, 0.0, 2.0], 4.0))
    method.end_task()
    start(method, weights, index=1)
    assert method.penalties()["ewc_loss"] == 0
    add(weights, 0.5)
    assert method.penalties()["ewc_loss"] == 3 / 2 * 0.25 * (1 + 0 + 2 + 4)
    method.keep_fisher(fisher([0.0, 1.0, 0.0], 0.0))
    start(method, weights, index=2)
    add(weights, 2.0)
    # Of the first task half is left, and the weights are held where the second has left them.
    term = method.penalties()["ewc_loss"]
    assert term.item() == 3 / 2 * 4 * (0.5 + 1 + 1 + 2)
    gradients = torch.autograd.grad(term, list(weights.values()))
    assert gradients[0].tolist() == [3.0 * 0.5 * 2, 3.0 * 2, 3.0 * 2] and gradients[1] == 12


def test_what_is_kept_is_all_that_a_later_run_needs(weights):
    method, other = EWC(EWC.Options()), EWC(EWC.Options())
    start(method, weights, index=0)
    assert method.kept() == {}
    method.keep_fisher(fisher([1.0, 0.0, 2.0], 4.0))
    other.take_kept(method.kept())
    for each in (method, other):
        start(each, weights, index=1)
    add(weights, 1.0)
    terms = [each.penalties()["ewc_loss"] for each in (method, other)]
    assert terms[0] == terms[1] == 5000 * 7


def test_other_weights_may_train_later(weights):
    method = EWC(EWC.Options(ewc_lambda=2.0, ewc_decay=0.5))
    method.take_kept({"a": torch.ones(3), "locked": torch.ones(2)})
    start(method, weights, index=1)
    add(weights, 1.0)
    assert method.penalties()["ewc_loss"] == 3
    method.keep_fisher(fisher([1.0, 0.0, 2.0], 4.0))
    assert {name: value.tolist() for name, value in method.kept().items()} == {
        "a": [1.5, 0.5, 2.5],
        "locked": [0.5, 0.5],
        "b": 4.0,
    }
    method.take_kept({"locked": torch.ones(2)})
    start(method, weights, index=2)
    assert method.penalties() == {}


def test_a_sum_is_rounded_alike_after_a_save():
    torch.manual_seed(0)
    kernel = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)
    weights = {"kernel": torch.nn.Parameter(kernel)}
    method, other = EWC(EWC.Options()), EWC(EWC.Options())
    method.take_kept({"kernel": torch.rand_like(kernel)})
    start(method, weights, index=1)
    start(other, weights, index=1)
    saved = method.get_extra_state()
    other.set_extra_state(
        {part: {n: v.contiguous() for n, v in values.items()} for part, values in saved.items()}
    )
    add(weights, 0.1)
    for part in ("_fisher", "_start"):
        (value,) = getattr(other, part).values()
        assert value.stride() == kernel.stride()
    assert method.penalties() == other.penalties()
