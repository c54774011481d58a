"""The plans that are compared for a shape, blocks of columns, and rows that no tile holds."""

from __future__ import annotations

import pytest

from mulki.kernels import schedule
from tests.kernels.triton_cases import make
from tests.kernels.triton_checks import (
    NUMBER_FORMATS,
    every_plan,
    in_one_memory,
    moved,
    precision,
    totals_and_gradients,
)
from tests.kernels.triton_helpers import all_close, backward, call, close

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


@pytest.mark.parametrize("p", [1000, 30000])
def test_models_whose_operands_lie_in_one_memory(p, number_format):
    case = in_one_memory(make("kl_label", number_format.dtype, 70, p, 64))
    here, upstream = in_one_memory(moved(case, "cuda")), case.upstream()
    rows, gradients = case.expected(upstream)
    with precision(number_format):
        found = call(here.op, *here.args)[0]
        made = backward(here, upstream.to("cuda"))
    close(found.cpu(), rows, number_format.sums)
    all_close([g.cpu() for g in made[:2]], gradients[:2], number_format.operands)
    close(made[2].cpu(), gradients[2], number_format.cancelling)
