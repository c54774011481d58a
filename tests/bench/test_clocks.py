"""Time on a GPU, with events that a test makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.bench import call_cost, clocks
from mulki.bench.cases import (
    MODES,
    Case,
)
from mulki.bench.losses import EAGER
from mulki.bench.point import measure_case
from tests.bench.bench_helpers import CASE


class Log:
    """Stands for torch.cuda, and notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def note(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "get_device_properties":
                return SimpleNamespace(L2_cache_size=1 << 20)
            return name

        return note

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        number = sum(call.startswith("record") for call in self.calls)
        return SimpleNamespace(
            record=lambda stream: self.calls.append(f"record on {stream}"),
            synchronize=lambda: self.calls.append("wait"),
            query=lambda: "busy" not in self.calls,
            elapsed_time=lambda stop: 8.0 * (stop.number - number),
            number=number,
        )

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(torch, "cuda", log)
    made = torch.empty

    def empty(size: int, **options: Any) -> Tensor:
        flush = made(1)
        log.calls.append(f"empty {size}")
        return flush

    monkeypatch.setattr(torch, "empty", empty)
    return log


def test_events_time_a_call_from_an_idle_device(cuda: Log) -> None:
    clock = clocks.EventClock("cuda")
    assert cuda.calls == ["get_device_properties", f"empty {2 << 20}"]
    cuda.calls.clear()
    clock.ready(None)
    start = clock.mark()
    stop = clock.mark()
    assert clock.seconds(start, stop) == 0.008
    on_stream = ["current_stream", "record on current_stream"]
    assert cuda.calls == ["synchronize", *on_stream, *on_stream, "wait"]


def test_the_device_alone_is_timed_while_the_host_is_ahead(cuda: Log) -> None:
    clock = clocks.EventClock("cuda")
    cuda.calls.clear()
    clock.ready(clocks.Window())
    assert cuda.calls == ["_sleep"]
    start = clock.mark()
    assert not clock.is_behind(start)
    cuda.calls.append("busy")
    assert clock.is_behind(start)


class Device:
    """A clock of a device that is kept busy for a window, while a call takes the host `host`."""

    def __init__(self, host: float) -> None:
        self.host, self.window = host, 0.0
        self.windows: list[float] = []

    def ready(self, window: clocks.Window | None) -> None:
        assert window is not None
        self.window = window.seconds
        self.windows.append(window.seconds)

    def mark(self) -> float:
        return 0.0

    def is_behind(self, mark: float) -> bool:
        return self.window > self.host

    def seconds(self, start: float, stop: float) -> float:
        return 0.25 + max(0.0, self.host - self.window)


def test_the_window_is_longer_than_what_the_host_takes() -> None:
    device, window = Device(host=0.011), clocks.Window()
    given: list[object] = []

    def again(_: object = None) -> None:
        given.append(None)

    # What is measured in too short a window is thrown away, gaps of the host and all.
    assert clocks.seconds_of(device, again, again, window) == 0.25
    assert device.windows == [0.002, 0.004, 0.008, 0.016] and len(given) == 8
    assert clocks.seconds_of(device, again, again, window) == 0.25
    assert device.windows[4:] == [0.016]


def test_a_call_that_waits_for_the_device_has_no_time_of_its_own() -> None:
    device, window = Device(host=math.inf), clocks.Window()
    assert math.isnan(clocks.seconds_of(device, dict, len, window)) and window.in_vain
    assert sum(device.windows) < 2
    tried = len(device.windows)
    assert math.isnan(clocks.seconds_of(device, dict, len, window))
    assert len(device.windows) == tried


def test_the_clock_is_made_ready_right_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Clock:
        def ready(self, window: clocks.Window | None) -> None:
            order.append("ready" if window is None else "ahead")

        def mark(self) -> int:
            order.append("mark")
            return len(order)

        def is_behind(self, mark: int) -> bool:
            return True

        def seconds(self, start: int, stop: int) -> float:
            return float(stop - start)

    monkeypatch.setattr(clocks, "clock_of", lambda device: Clock())
    inputs = Case("similarity", 3, 3, 4, "float32").inputs()

    def loss(*arguments: Tensor) -> Tensor:
        order.append("call")
        return EAGER["similarity"](*arguments)

    found = {}
    for mode in MODES:
        order.clear()
        window = clocks.Window() if mode == "both" else None
        call_cost.timed(mode, loss, inputs, "cuda", window)
        found[mode] = order.copy()
    assert found["forward"] == ["ready", "mark", "call", "mark"]
    assert found["backward"] == ["call", "ready", "mark", "mark"]
    assert found["both"] == ["ahead", "mark", "call", "mark"]
    order.clear()
    assert call_cost.timed_call(lambda: order.append("replay"), "cuda") == 2.0
    assert order == ["ready", "mark", "replay", "mark"]


def test_a_gpu_has_a_time_of_its_own_in_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    alone = 0.001

    def timed(mode: str, loss: Any, inputs: Any, device: str, window: Any) -> float:
        asked.append(window)
        return 0.002 if window is None else alone

    monkeypatch.setattr(call_cost, "timed", timed)
    monkeypatch.setattr(clocks, "has_events", lambda device: True)
    (result,) = measure_case(CASE, ("eager",), ("both",), seconds=1e-9)
    assert result.metrics["speed"].median == 2.0 and result.metrics["device_time"].median == 1.0
    # The window is the provider's own, so that it grows once.
    assert len({id(window) for window in asked}) == 2 and None in asked
    alone = math.nan
    (result,) = measure_case(CASE, ("eager",), ("both",), seconds=1e-9)
    assert "device_time" not in result.metrics and "waits for the device" in str(result.notes)
