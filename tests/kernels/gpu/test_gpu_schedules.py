"""The plans that are compared for a shape, blocks of columns, and rows that no tile holds."""

from __future__ import annotations

import pytest

from mulki.kernels import schedule
from tests.kernels.triton_checks import (
    NUMBER_FORMATS,
    every_plan,
    totals_and_gradients,
)

pytestmark = pytest.mark.gpu

NAMES = ("ce_all", "kl_label", "contrastive", "siglip_block")


@pytest.fixture(params=NUMBER_FORMATS)
def number_format(request):
    return NUMBER_FORMATS[request.param]


@pytest.mark.parametrize("name", NAMES)
def test_every_plan(name, number_format, monkeypatch):
    tried = every_plan(name, number_format, (300, 100, 64), "cuda", monkeypatch)
    whole = name in ("ce_all", "kl_label")
    assert tried == {"chunks", "blocks"} | ({"rows"} if whole else set())


@pytest.mark.parametrize("p", [1000, 4096, 30000])
@pytest.mark.parametrize("name", ["ce_all", "kl_label"])
def test_tiles_of_stored_logits(name, p, number_format):
    """All columns in the registers of one warp, of many, and of none."""
    held = p <= schedule.row_tile("sm_90", 3, p).columns
    assert held == (p < 30000)
    totals_and_gradients(name, number_format, (70, p, 64), "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_many_rows(name, number_format):
    totals_and_gradients(name, number_format, (5000, 1100, 64), "cuda")
