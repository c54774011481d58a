"""Values and gradients of every operator on a GPU, in every precision, against float64."""

from __future__ import annotations

import pytest

from tests.kernels.triton_cases import LOSSES, NAMES
from tests.kernels.triton_checks import (
    NUMBER_FORMATS,
    repeats,
    rows_and_gradients,
    totals_and_gradients,
)

pytestmark = pytest.mark.gpu

# Nothing that a tile divides, in whole rows; then stored logits.
SMALL, STORED = (19, 35, 20), (128, 1000, 512)
RAGGED = ((1, 257, 64), (7, 100, 512), (130, 1001, 768), (300, 10, 1280), (63, 64, 65))


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
@pytest.mark.parametrize("shape", [SMALL, STORED], ids=["small", "stored"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_their_gradients(name, shape, number_format):
    rows_and_gradients(name, NUMBER_FORMATS[number_format], shape, "cuda")


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
@pytest.mark.parametrize("name", LOSSES)
def test_means_and_their_gradients(name, number_format):
    totals_and_gradients(name, NUMBER_FORMATS[number_format], STORED, "cuda")


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("name", ["ce_all", "kl_label", "contrastive"])
def test_ragged_shapes(name, shape, number_format):
    rows_and_gradients(name, NUMBER_FORMATS[number_format], shape, "cuda")


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["cosines", "ce_all", "kl_label", "contrastive", "siglip"])
def test_results_repeat_bit_for_bit_and_nothing_is_mutated(name, number_format):
    repeats(name, NUMBER_FORMATS[number_format], STORED, "cuda")


@pytest.mark.parametrize("name", ["cosines", "kl_label", "siglip"])
def test_ieee_products_of_fp32(name, monkeypatch):
    monkeypatch.setenv("MULKI_INPUT_PRECISION", "ieee")
    rows_and_gradients(name, NUMBER_FORMATS["fp32"], SMALL, "cuda")
