"""What operators return: nothing mutated, nothing shared, and nothing that waits for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.ops.chunked.results import bound
from tests.ops.chunked.watch import TEACHERS, computed, on_meta
from tests.ops.op_cases import FORMS, LOSSES, NAMES, asking, make, run


@pytest.mark.parametrize("name", TEACHERS)
def test_nothing_waits_for_the_device(name):
    """No number is read on the host: a CUDA graph can be made of it."""
    names = computed(on_meta(name, 300, 300, torch.float32)).names
    assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero"} & set(names)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_mutated_and_results_share_no_memory(name):
    for form in FORMS if name in LOSSES else FORMS[:2]:
        case = asking(make(name, dtype=torch.float32), form)
        tensors = [one for value in case.args for one in _tensors(value)]
        before = [one.clone() for one in tensors]
        found = run(case)
        assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))
        places = {one.untyped_storage().data_ptr() for one in tensors}
        assert not places & {one.untyped_storage().data_ptr() for one in found if one.numel()}


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, Tensor)]


def test_no_gradient_of_a_logit_is_larger():
    upstream, weights = torch.tensor([1.0, -3.0]), torch.tensor([[0.5, 1.0], [1.0, -1.0]])
    x = torch.empty(2, 4, dtype=torch.float16)
    assert bound(x, None) is None and bound(x, torch.empty(0)) is None
    assert bound(x, upstream) == 3 and bound(x, upstream, weights) == 6
    assert bound(x, 0 * upstream) > 0 and bound(x.float(), upstream) is None
