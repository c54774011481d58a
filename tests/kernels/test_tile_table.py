"""The table of tiles: every line of it is reachable, and the default is fixed unless asked."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from mulki.kernels import tiles

FAMILIES = {"half": (True, "ieee"), "tf32": (False, "tf32"), "float": (False, "tf32x3")}


def device(architecture: str, family: str) -> tiles.Device:
    return tiles.Device(architecture, *FAMILIES[family])


def test_every_line_is_one_that_is_asked_for():
    asked = {kind for kind, _, _ in tiles.TABLE}
    for kind, architecture, family in tiles.TABLE:
        places = (architecture,) if architecture else tiles.ARCHITECTURES
        assert {device(place, family).table_architecture for place in places} == set(places)
        assert family in {device(place, family).family for place in places}
        exact = [(kind, place, family) in tiles.TABLE for place in places]
        assert architecture or not all(exact), f"{kind}: nobody takes the general line"
    # A kind is a schedule of a plan, and some of them swapped.
    plans = [
        plan
        for architecture in tiles.ARCHITECTURES
        for family in FAMILIES
        for kept, streamed in ((64, 100), (65536, 4096))
        for plan in (
            *tiles.row_plans(device(architecture, family), kept, streamed),
            *tiles.row_plans(device(architecture, family), kept, streamed, "sums"),
            *tiles.grid_plans(device(architecture, family), kept, streamed),
            *tiles.gradient_plans(device(architecture, family), kept, streamed, 512),
            *([] if family == "float" else [tiles.stored_plan(device(architecture, family), 8, 8)]),
        )
    ]
    assert {plan.schedule for plan in plans} == {kind.removesuffix(" swapped") for kind in asked}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", tiles.ARCHITECTURES)
def test_the_line_of_an_architecture_goes_before_the_general_one(architecture, family):
    for kind in {kind for kind, _, _ in tiles.TABLE}:
        lines = [tiles.TABLE.get((kind, place, family)) for place in (architecture, "")]
        wanted = next((line for line in lines if line is not None), ())
        assert device(architecture, family).tiles(kind) == wanted


def test_architecture_numbers_and_width_each_change_a_default():
    def rows(architecture: str, family: str) -> tiles.Tile:
        return tiles.row_plans(device(architecture, family), 65536, 4096)[0].tile

    assert len({rows(name, "half") for name in ("sm_80", "sm_90", "gfx942")}) == 3
    assert len({rows("sm_90", family) for family in FAMILIES}) == 3
    widths = {
        tiles.gradient_plans(device("sm_90", "half"), 65536, 4096, width)[0].tile.slice
        for width in (64, 512, 1024)
    }
    assert widths == {64, 512, 256}


def test_plans_ask_no_device(monkeypatch):
    """The same on every card of an architecture, so that sums round alike."""

    def asked(*_: object) -> None:
        raise AssertionError("a device was asked")

    for name in ("get_device_properties", "get_device_capability", "current_device"):
        monkeypatch.setattr(torch.cuda, name, asked)
    for make in (tiles.row_plans, tiles.grid_plans, tiles.gradient_plans):
        make.cache_clear()
    here = device("sm_90", "half")
    assert tiles.row_plans(here, 300, 700) and tiles.gradient_plans(here, 300, 700, 512)
    assert tiles.grid_plans(here, 300, 700) and tiles.stored_plan(here, 300, 700)
    assert tiles.chunk_rows(here, 8192, 8192, 3) > 0


@pytest.fixture
def autotune(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    module = importlib.import_module("mulki.kernels.autotune")
    monkeypatch.setenv("MULKI_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MULKI_AUTOTUNE", "1")
    monkeypatch.setattr(module, "_chosen", {})
    return module


def test_deterministic_algorithms_take_the_default_whatever_was_timed(autotune, monkeypatch):
    plans = tiles.row_plans(device("sm_90", "half"), 65536, 4096)
    monkeypatch.setattr(autotune, "milliseconds", lambda function: -plans.index(function()))

    def chosen() -> tiles.Plan:
        return autotune.run("rows", device("sm_90", "half"), (65536, 4096), plans, lambda one: one)

    assert chosen() == plans[-1]
    assert len(json.loads(autotune.cache_file().read_text())) == 1
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == plans[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen() == plans[-1]
    monkeypatch.setenv("MULKI_AUTOTUNE", "0")
    assert chosen() == plans[0]


def test_a_plan_that_does_not_fit_the_gpu_is_the_slowest(autotune, monkeypatch):
    errors = importlib.import_module("triton.runtime.errors")
    testing = importlib.import_module("triton.testing")
    monkeypatch.setattr(testing, "do_bench", lambda function, return_mode: function())

    def too_large() -> float:
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    assert autotune.milliseconds(lambda: 2.5) == 2.5
    assert autotune.milliseconds(too_large) == float("inf")
    with pytest.raises(ZeroDivisionError):
        autotune.milliseconds(lambda: 1 / 0)
