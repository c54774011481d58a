"""What operators return: nothing mutated, nothing shared, and nothing that waits for a device."""

from __future__ import annotations

import pytest
import torch

from mulki.ops.chunked.results import bound
from tests.ops.chunked.watch import TEACHERS, computed, on_meta


@pytest.mark.parametrize("name", TEACHERS)
def test_nothing_waits_for_the_device(name):
    """No number is read on the host: a CUDA graph can be made of it."""
    names = computed(on_meta(name, 300, 300, torch.float32)).names
    assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero"} & set(names)


def test_no_gradient_of_a_logit_is_larger():
    upstream, weights = torch.tensor([1.0, -3.0]), torch.tensor([[0.5, 1.0], [1.0, -1.0]])
    x = torch.empty(2, 4, dtype=torch.float16)
    assert bound(x, None) is None and bound(x, torch.empty(0)) is None
    assert bound(x, upstream) == 3 and bound(x, upstream, weights) == 6
    assert bound(x, 0 * upstream) > 0 and bound(x.float(), upstream) is None
