"""The functions of `mulki.ops`: what they make of scales, dtypes and devices."""

from __future__ import annotations

import pytest
import torch

from mulki import ops
from mulki.ops.gates import Weighting
from mulki.ops.logits import wide

UNIFORM = Weighting.of("uniform")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [9, 9.0, torch.tensor(9.0), torch.tensor(9.0).bfloat16()])
def test_scales_become_wide_tensors(unit, calls, dtype, scale):
    x, w = unit(6, 4).to(dtype), unit(6, 4).to(dtype)
    ops.siglip.loss((x, w, scale), -3, "mean")
    for number, value in zip(calls[0][1][2:4], (9, -3), strict=True):
        assert (number.shape, number.dtype) == ((), wide(dtype))
        assert number == value


@pytest.mark.parametrize("scales", [(9.0, 9.0), (9.0, 4.0), (9.0, torch.tensor(4.0)), (9, 9.5)])
def test_scales_of_teachers_become_wide_tensors(unit, calls, scales):
    x, w = unit(6, 4).float(), unit(5, 4).float()
    teachers = [(x, w, scale) for scale in scales]
    options = 2.0, True, None, UNIFORM, None, None, "mean"
    ops.teacher_kl.loss((x, w, 5.0), teachers, *options)
    given = calls[0][1][5]
    assert all(scale.dtype == torch.float32 for scale in given)
    assert [scale.item() for scale in given] == [float(scale) for scale in scales]
