"""The checks that a GPU is given, here in the interpreter: they pass, and they can fail."""

from __future__ import annotations

import pytest
import torch
from mulki.kernels import common
from triton_cases import LOSSES, NAMES, D, N, P
from triton_checks import (
    NUMBERS,
    plans,
    precision,
    repeats,
    rows_and_gradients,
    totals_and_gradients,
)

SHAPE = (N, P, D)


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_gradients(name):
    rows_and_gradients(name, NUMBERS["fp32"], SHAPE, "cpu")


@pytest.mark.parametrize("numbers", NUMBERS)
def test_all_numbers(numbers):
    rows_and_gradients("cosines", NUMBERS[numbers], SHAPE, "cpu")
    totals_and_gradients("kl_label", NUMBERS[numbers], SHAPE, "cpu")


@pytest.mark.parametrize("name", LOSSES[::3])
def test_repeats(name):
    repeats(name, NUMBERS["fp32"], SHAPE, "cpu")


def test_what_is_wrong_is_noticed(monkeypatch):
    monkeypatch.setattr(common, "upcast", lambda models: False)
    with pytest.raises(AssertionError):
        rows_and_gradients("ce", NUMBERS["bf16"], SHAPE, "cpu")


def test_plans_and_the_setting_of_tf32():
    common.empty(torch.ones(1), 1)  # the memory fixture wants an allocation
    assert {plan.schedule for plan in plans(NUMBERS["fp32"], SHAPE, "cpu", "rows")}
    assert len(plans(NUMBERS["bf16"], SHAPE, "cpu", "dw")) > 2
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with precision(NUMBERS["tf32"]):
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before
