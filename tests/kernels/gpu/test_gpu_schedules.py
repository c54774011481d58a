"""Every plan that the table has for this GPU, and the chunks of large problems."""

from __future__ import annotations

import pytest

from mulki.kernels import tiles
from tests.kernels.triton_checks import (
    NUMBER_FORMATS,
    every_plan_of_gradients,
    every_plan_of_statistics,
    totals_and_gradients,
)

pytestmark = pytest.mark.gpu

SHAPE = (300, 1000, 512)
LARGE = (4096, 1100, 64)  # the least of which rows are cut into chunks, and some


def test_every_plan_of_the_statistics(number_format, monkeypatch):
    tried = every_plan_of_statistics(NUMBER_FORMATS[number_format], SHAPE, "cuda", monkeypatch)
    assert tried == {"rows", "rows small"}


@pytest.mark.parametrize("side", ["dx", "dw"])
def test_every_plan_of_the_gradients(side, number_format, monkeypatch):
    tried = every_plan_of_gradients(side, NUMBER_FORMATS[number_format], SHAPE, "cuda", monkeypatch)
    assert {"slice", "part", "part small"} <= tried


@pytest.mark.parametrize("name", ["ce_all", "kl_label", "contrastive", "siglip"])
def test_chunks_of_rows(name, number_format, monkeypatch):
    if number_format == "fp32":
        pytest.skip("strict float32 takes no chunks")
    asked = []
    usual = tiles.chunk_rows
    monkeypatch.setattr(
        tiles, "chunk_rows", lambda *shape: asked.append(usual(*shape)) or min(asked[-1], 1000)
    )
    totals_and_gradients(name, NUMBER_FORMATS[number_format], LARGE, "cuda")
    assert asked and all(rows > 1000 for rows in asked)


@pytest.fixture(params=NUMBER_FORMATS)
def number_format(request):
    return request.param
