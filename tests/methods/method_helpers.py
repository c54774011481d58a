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
