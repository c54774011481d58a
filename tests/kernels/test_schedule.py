"""The chooser: schedules by modelled cost, blocks within their memory, and tiles."""

from __future__ import annotations

import pytest
import torch

from mulki.kernels import schedule
from mulki.kernels.schedule import Problem


@pytest.fixture(autouse=True)
def plans_of_todays_constants():
    """What a test changes is undone before this ends."""
    yield
    schedule.plan.cache_clear()


HALF, SINGLE = torch.bfloat16, torch.float32
FAMILIES = ("half", "tf32", "float")
DUAL = (512,) * 3


def problem(n, p, widths=DUAL, family="half", gradient=True, **kind):
    return Problem(n, p, widths, family, gradient, **(kind or {"whole": True}))


def chosen(*shape, **other):
    return schedule.plan(problem(*shape, **other))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", [64, 512, 768, 1280])
def test_which_schedule_is_taken(family, width):
    widths = (width,) * 3
    assert chosen(64, 100, widths, family).schedule == "rows"
    for n, p in ((64, 1000), (256, 1000), (65536, 1000), (4096, 4096), (16384, 16384)):
        assert chosen(n, p, widths, family).schedule == "chunks"
    assert chosen(256, 1000, widths, family).rows == 256
    if width >= 512:
        assert chosen(65536, 65536, widths, "half").schedule == "blocks"
    # There is no kernel for whole rows of pairs, which take no statistics for their G either.
    assert chosen(64, 100, (width,), family, softmax=False).schedule == "chunks"


def test_the_cost_and_no_threshold_decides(monkeypatch):
    assert chosen(2048, 100).schedule == "rows"
    slow = {family: rates._replace(kernel=1e12) for family, rates in schedule.H100.items()}
    monkeypatch.setattr(schedule, "H100", slow)
    schedule.plan.cache_clear()
    assert chosen(2048, 100).schedule == "chunks"
    monkeypatch.setattr(schedule, "HOST", 1e-3)
    schedule.plan.cache_clear()
    assert chosen(2048, 100).schedule == "rows"  # the fewest launches


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("models", [1, 3, 6, 200])
@pytest.mark.parametrize("kind", [{"whole": True}, {"softmax": False}, {"columns_too": True}])
def test_blocks_stay_within_their_memory(family, models, kind):
    for n in (1, 64, 257, 4096, 65536, 20_000_000):
        for p in (1, 100, 1000, 8192, 65536, 20_000_000):
            for plan in schedule.candidates(problem(n, p, (512,) * models, family, **kind)):
                assert plan.rows >= 1 and plan.columns <= p
                if plan.schedule != "rows":
                    assert plan.rows <= n
                    block = 4 * models * plan.rows * plan.columns
                    assert block <= schedule.MEMORY
                    assert block <= schedule.OF_BLOCKS or plan[1:] == (n, p)


def test_logits_that_fit_the_cache_are_read_faster(monkeypatch):
    contrastive = problem(16384, 16384, (512,), columns_too=True)
    assert schedule.plan(contrastive).columns == 4096
    fits, does_not = schedule.Plan("blocks", 2048, 4096), schedule.Plan("blocks", 2048, 8192)

    def seconds_of_a_logit(plan):
        return schedule.seconds(contrastive, plan)

    faster = seconds_of_a_logit(does_not) / seconds_of_a_logit(fits)
    none = {family: rates._replace(cache=0) for family, rates in schedule.H100.items()}
    monkeypatch.setattr(schedule, "H100", none)
    schedule.plan.cache_clear()
    assert schedule.plan(contrastive).columns > 4096
    assert seconds_of_a_logit(does_not) / seconds_of_a_logit(fits) < faster


def test_of_plans_that_take_about_as_long_the_one_of_fewest_launches_is_taken(monkeypatch):
    strict = problem(16384, 16384, (512,), "float")

    def launches(plan):
        return sum(count for count, _ in schedule._launches(strict, plan))

    plan = chosen(16384, 16384, (512,), "float")
    monkeypatch.setattr(schedule, "NEAR", 1.0)
    schedule.plan.cache_clear()
    fastest = chosen(16384, 16384, (512,), "float")
    assert launches(plan) < launches(fastest)
    assert schedule.seconds(strict, plan) <= 1.05 * schedule.seconds(strict, fastest)


def test_logits_are_made_again_only_where_rows_are_in_parts():
    def products(plan, **kind):
        made = schedule._launches(problem(8192, 8192, **kind), plan)
        return sum(count for count, _ in made)

    chunks, blocks = schedule.Plan("chunks", 512, 8192), schedule.Plan("blocks", 512, 4096)
    assert products(chunks) == 16 * 6  # 3 logits, G and 2 products with it, for each chunk
    assert products(blocks) == 32 * 10  # statistics, and 3 logits again
    assert products(blocks, softmax=False) == 32 * 6
    assert products(chunks, gradient=False) == 16 * 4


@pytest.mark.parametrize("models", [1, 2, 3, 4, 6])
def test_tiles_of_stored_logits_fit_the_registers(models):
    for columns in (1, 100, 1000, 4096, 16384, 65536):
        tile = schedule.row_tile("sm_90", models, columns)
        assert all(size & (size - 1) == 0 for size in tile) and tile.warps <= 16
        each = models * tile.rows * tile.columns / (32 * tile.warps)
        # Where the row does not fit, a lane keeps four statistics for each of its columns.
        assert each <= (48 if tile.columns >= columns else 24)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_tiles_of_whole_rows_fit_the_registers(architecture, dtype):
    family = "half" if dtype == HALF else "float"
    for models in (1, 3, 5):
        for p in (1, 60, 100, 250):
            for plan in schedule.candidates(problem(4096, p, (512,) * models, family)):
                if plan.schedule != "rows":
                    continue
                tile = schedule.whole_tile(architecture, models, plan.rows, p, dtype)
                assert tile.columns >= p and tile.rows == plan.rows
                threads = tile.warps * (64 if architecture == "gfx942" else 32)
                assert models * tile.rows * tile.columns <= 48 * threads


def test_plans_ask_no_device(monkeypatch):
    """The same on every card of an architecture, so that sums round alike."""

    def asked(*_: object) -> None:
        raise AssertionError("a device was asked")

    for name in ("get_device_properties", "get_device_capability", "current_device"):
        monkeypatch.setattr(torch.cuda, name, asked)
    schedule.plan.cache_clear()
    assert chosen(300, 700)
