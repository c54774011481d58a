"""Checks of values that the public functions leave to the operators."""

from __future__ import annotations

import pytest
import torch

from tests.ops.op_cases import LABELS, cross_entropy, make, run, with_argument


def test_a_class_mask_without_a_class_is_refused(backend):
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    case = cross_entropy(x, w, [-100, -100], torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="class_mask"):
        run(case)


def test_targets_are_checked_in_compiled_code_too(backend):
    case = make("ce", dtype=torch.float32)
    compiled = torch.compile(
        lambda target: run(with_argument(case, 3, target))[0], backend="eager", fullgraph=True
    )
    compiled(LABELS)
    with pytest.raises(ValueError, match="target"):
        compiled(LABELS + 2)
