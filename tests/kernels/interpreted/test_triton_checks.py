"""The checks that a GPU is given, here in the interpreter: they pass, and they can fail."""

from __future__ import annotations

import pytest
import torch

from mulki.kernels import common
from mulki.ops import use_backend
from tests.kernels.triton_cases import D, N, P
from tests.kernels.triton_checks import (
    NUMBER_FORMATS,
    every_plan,
    precision,
    repeats,
    rows_and_gradients,
    totals_and_gradients,
)
from tests.kernels.triton_helpers import close
from tests.kernels.triton_steps import LOSSES, SIZES, Step

SHAPE = (N, P, D)


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_all_numbers(number_format):
    rows_and_gradients("cosines", NUMBER_FORMATS[number_format], SHAPE, "cpu")
    totals_and_gradients("kl_label", NUMBER_FORMATS[number_format], SHAPE, "cpu")


def test_repeats():
    repeats("kl_label", NUMBER_FORMATS["fp32"], SHAPE, "cpu")


def test_what_is_wrong_is_noticed(monkeypatch):
    monkeypatch.setattr(common, "upcast", lambda models: False)
    with pytest.raises(AssertionError):
        rows_and_gradients("ce", NUMBER_FORMATS["bf16"], SHAPE, "cpu")


def test_every_plan(monkeypatch):
    tried = every_plan("ce_all", NUMBER_FORMATS["fp16"], SHAPE, "cpu", monkeypatch)
    assert tried == {"rows", "chunks", "blocks"}


def test_the_setting_of_tf32():
    common.empty_float32(torch.ones(1), 1)  # the memory fixture wants an allocation
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with precision(NUMBER_FORMATS["tf32"]):
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("name", LOSSES)
def test_steps_are_those_of_the_reference(name, monkeypatch):
    monkeypatch.setenv("MULKI_STRICT", "1")
    monkeypatch.setitem(SIZES, "small", (18, 20, 8))
    found = {}
    for backend in ("triton", "reference"):
        with use_backend(backend):
            step = Step(name, device="cpu")
            found[backend] = [*step()]
            step.draw_again()
            found[backend] += step()
    assert found["triton"][0] != found["triton"][len(step.leaves) + 1]
    for one, other in zip(found["triton"], found["reference"], strict=True):
        # Operands are bfloat16, and the interpreter cuts it off where torch rounds.
        close(one, other, 1e-2)
