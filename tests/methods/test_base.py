"""What a method inherits that does not define it."""

from __future__ import annotations

import pytest

from mulki.methods.finetune import Finetune
from mulki.methods.lwf import LwF
from mulki.methods.zero_shot import ZeroShot
from tests.methods.method_helpers import add, start


@pytest.mark.parametrize("method", [Finetune, LwF, ZeroShot])
def test_baselines_have_no_state_and_leave_weights_alone(method, weights):
    made = start(method(method.Options()), weights)
    add(weights, 1.0)
    made.after_step(1)
    made.end_task()
    assert not made.state_dict() and not list(made.parameters())
    assert made.penalties() == {} and made.prototypes() is None
    assert weights["a"].tolist() == [2, 2, 2]
