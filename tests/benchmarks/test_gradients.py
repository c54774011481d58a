"""Gradient norms of a method's terms by tower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.embedded.gradients import gradient_norms, table


def test_norms_are_those_of_all_weights_of_a_tower() -> None:
    weights = {
        "visual.a": nn.Parameter(torch.tensor([1.0, 2.0])),
        "visual.b": nn.Parameter(torch.tensor(3.0)),
        "text.proj": nn.Parameter(torch.tensor(4.0)),
    }
    a, b, text = weights.values()
    term = (3 * a).sum() + 4 * b
    norms = gradient_norms(term, weights)
    assert norms == {"image": pytest.approx((9 + 9 + 16) ** 0.5), "text": 0.0}
    # The graph is kept for the terms that come after, and for the step.
    assert gradient_norms(term + 5 * text, weights)["text"] == pytest.approx(5.0)
    assert gradient_norms(torch.tensor(1.0), weights) == {"image": 0.0, "text": 0.0}


def test_the_table_has_means_by_term() -> None:
    notes = [
        {"task": 0, "step": 1, "term": "ce", "image": 1.0, "text": 0.0},
        {"task": 0, "step": 2, "term": "ce", "image": 2.0, "text": 1.0},
        {"task": 0, "step": 1, "term": "feature", "image": 0.5, "text": 0.0},
    ]
    assert table(notes).splitlines()[2:] == [
        "| ce | 1.5000 | 0.5000 |",
        "| feature | 0.5000 | 0.0000 |",
    ]
