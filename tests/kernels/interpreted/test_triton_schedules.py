"""Every schedule gives the results of every other: splits, slices, parts, groups, chunks."""

from __future__ import annotations

import pytest
import torch

from mulki.kernels import gradients, row_results, row_softmax, tiles
from mulki.kernels.tiles import Plan, Tile
from tests.kernels.triton_cases import Case, make
from tests.kernels.triton_helpers import TOLERANCE, all_close, backward, call, close, error, reduced

FLOAT = TOLERANCE[torch.float32]

# Rows of 20 columns: one slice holds them, or two do; tiles of 16 and of 32.
GRADIENT_PLANS = (
    Plan("wide", Tile(16, 16, 16, 32, 1, 1), 1),
    Plan("wide", Tile(16, 32, 32, 32, 1, 1), 2),
    Plan("slice", Tile(32, 16, 16, 16, 1, 1), 1),
    Plan("slice", Tile(16, 16, 32, 16, 1, 1), 2),
    Plan("part", Tile(16, 16, 16, 16, 1, 1), 1),
    Plan("part small", Tile(16, 16, 16, 32, 1, 1), 2),
)


def plan_gradients(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setattr(tiles, "gradient_plans", lambda *shape: [plan])


def expected_gradients(name: str) -> tuple[Case, list[torch.Tensor]]:
    case = make(name)
    return case, list(case.expected(case.upstream())[1])


@pytest.mark.parametrize("plan", GRADIENT_PLANS, ids=lambda p: f"{p.schedule}-{p.splits}")
@pytest.mark.parametrize("name", ["cosines", "ce_all", "kl_weights", "contrastive", "siglip_block"])
def test_gradients(name, plan, monkeypatch):
    case, want = expected_gradients(name)
    plan_gradients(monkeypatch, plan)
    wanted = [True, True, *[False] * (case.leaves - 2)]
    got = backward(case, case.upstream(), wanted)
    all_close(got[:2], want[:2], FLOAT)
    assert all(g.shape == (0,) for g in got[2:])


@pytest.mark.parametrize("plan", GRADIENT_PLANS[::3], ids=lambda p: p.schedule)
@pytest.mark.parametrize("size", [1e-5, 300.0])
def test_small_and_large_float16_gradients_keep_their_precision(size, plan, monkeypatch):
    # Most of G is below the normal numbers of float16 or, after a fixed factor, above the largest.
    plan_gradients(monkeypatch, plan)
    case = make("ce", torch.float16, scale=30.0)
    upstream = size * case.upstream()
    _, want = case.expected(upstream)
    error_of = [error(g, w) for g, w in zip(backward(case, upstream), want, strict=True)]
    assert max(error_of) < 2e-3
    compute = row_results.compute
    monkeypatch.setattr(gradients.LogitGradient, "range_factor", 1.0 if size < 1 else 256.0)
    monkeypatch.setattr(row_results, "compute", lambda *args: compute(*args[:3]))  # no bound
    assert error(backward(case, upstream)[1], want[1]) > 2e-3


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("name", ["ce_all", "kl_label", "contrastive", "siglip_block"])
def test_splits_of_the_statistics(name, splits, monkeypatch):
    plan = Plan("rows", Tile(16, 16, 16, 0, 1, 1), splits)
    monkeypatch.setattr(tiles, "row_plans", lambda *shape: [plan])
    case = make(name, n=35 if name in ("contrastive", "siglip") else 19)
    want, of_leaves = case.expected(case.upstream())
    close(call(case.op, *case.args)[0], want, FLOAT)
    wanted = [False, False, *[True] * (case.leaves - 2)]
    got = backward(case, case.upstream(), wanted)
    all_close(got[2:], of_leaves[2:], FLOAT)


def test_more_teachers_than_a_launch_takes(monkeypatch):
    case = make("kl_label", k=3)
    upstream = case.upstream()
    want = [*call(case.op, *case.args), *backward(case, upstream)]
    monkeypatch.setattr(row_softmax, "MAX_TEACHERS", 2)
    got = [*call(case.op, *case.args), *backward(case, upstream)]
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "name", ["ce_all", "kl_weights", "kl_label", "contrastive", "siglip_block"]
)
def test_chunks(name, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "chunk_rows", lambda *shape: 8)  # 8, 8 and 3 rows
    case = make(name, dtype)
    upstream = case.upstream()
    _, want = case.expected(upstream)
    got = backward(case, upstream)
    all_close(got[:2], want[:2], max(FLOAT, TOLERANCE[dtype] * 2))
    total, want = case.expected(mean=True)
    found, got, details = reduced(case)
    close(found, total, FLOAT)
    all_close(got, want, max(FLOAT, TOLERANCE[dtype] * 2))
    if details:
        all_close(details, call(case.op, *case.args)[1:], FLOAT)


def test_one_row_of_one_column():
    for name in ("similarity", "ce", "kl", "contrastive", "siglip"):
        case = make(name, n=1, p=1, d=1)
        upstream = case.upstream()
        rows, want = case.expected(upstream)
        got = [call(case.op, *case.args)[0], *backward(case, upstream)]
        for one, other in zip(got, [rows, *want], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6)


def test_the_interpreter_times_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("MULKI_AUTOTUNE", "1")
    monkeypatch.setenv("MULKI_CACHE_DIR", str(tmp_path))
    case = make("ce")
    all_close(backward(case, case.upstream()), case.expected(case.upstream())[1], FLOAT)
    assert not list(tmp_path.iterdir())
