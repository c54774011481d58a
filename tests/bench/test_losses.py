"""The functions that are compared compute the same."""

from __future__ import annotations

import pytest
import torch

from mulki.bench.cases import OPERATORS, PAIRED, Case
from mulki.bench.losses import EAGER, MULKI


@pytest.mark.parametrize("operator", OPERATORS)
def test_ours_and_plain_pytorch_are_one_function(operator: str) -> None:
    case = Case(operator, 9, 9 if operator in PAIRED else 6, 8, "float32")
    arguments = case.inputs(torch.float64).arguments
    torch.testing.assert_close(MULKI[operator](*arguments), EAGER[operator](*arguments))
