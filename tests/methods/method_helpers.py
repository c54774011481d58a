"""A method at the start of a task, and what an optimiser does to weights."""

from __future__ import annotations

import torch

from mulki.methods import TaskStart


def start(method, weights, prototypes=None, index=0):
    method.start_task(TaskStart(index, 4, 10, weights, prototypes))
    return method


def add(weights, amount):
    """What an optimiser step does."""
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(amount)


def assert_same_gradients(losses, expected, inputs):
    """Check each term by name, and the gradient of their sum with respect to each input."""
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)
    ours, wanted = (torch.autograd.grad(sum(t.values()), inputs) for t in (losses, expected))
    for one, other in zip(ours, wanted, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other)
