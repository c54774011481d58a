"""The plans that are compared for a shape, blocks of columns, and rows that no tile holds."""

from __future__ import annotations

import pytest
import torch

from mulki.kernels import schedule, streamed_rows
from tests.kernels.triton_cases import described, make
from tests.kernels.triton_checks import (
    NUMBER_FORMATS,
    every_plan,
    moved,
    rows_and_gradients,
    totals_and_gradients,
)
from tests.kernels.triton_helpers import call

pytestmark = pytest.mark.gpu

NAMES = ("ce_all", "kl_label", "contrastive", "siglip_block")


@pytest.fixture(params=NUMBER_FORMATS)
def number_format(request):
    return NUMBER_FORMATS[request.param]


@pytest.mark.parametrize("name", NAMES)
def test_every_plan(name, number_format, monkeypatch):
    tried = every_plan(name, number_format, (300, 100, 64), "cuda", monkeypatch)
    whole = name in ("ce_all", "kl_label")
    # Those of 64 columns are streamed, of teachers that are wider are not.
    streamed = name == "ce_all" and number_format.dtype.itemsize == 2
    others = ({"rows"} if whole else set()) | ({"stream"} if streamed else set())
    assert tried == {"chunks", "blocks"} | others


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


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(300, 1100, 64), (5000, 3000, 200), (20000, 130, 72)])
@pytest.mark.parametrize("name", ["ce_all", "kl_label", "kl_weights"])
def test_statistics_without_stored_logits(name, shape, half, monkeypatch):
    """Of several parts of the columns, and of more blocks than programs; they repeat exactly."""
    plan, taken, compute = schedule.Plan("stream", 1000, 256), [], streamed_rows.compute
    monkeypatch.setattr(schedule, "plans", lambda problem: (plan,))
    monkeypatch.setattr(
        streamed_rows, "compute", lambda rows: (taken.append(rows), compute(rows))[1]
    )
    rows_and_gradients(name, NUMBER_FORMATS[half], shape, "cuda", descriptors=True)
    case = described(moved(make(name, NUMBER_FORMATS[half].dtype, *shape, step=8), "cuda"))
    first, second = (call(case.op, *case.args) for _ in range(2))
    assert all(map(torch.equal, first, second)) and len(taken) >= 4
