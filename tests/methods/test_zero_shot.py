"""The start model, which is not trained."""

from __future__ import annotations

import pytest

from mulki.methods.zero_shot import ZeroShot


def test_zero_shot_does_not_train(student, target):
    method = ZeroShot(ZeroShot.Options())
    assert not ZeroShot.trains
    with pytest.raises(TypeError, match="zero_shot"):
        method.losses(student, (), target)
