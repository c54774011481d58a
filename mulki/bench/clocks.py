"""What time is read from: the host's clock, or events on a GPU's stream."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

_CYCLES = 2e9  # a second, or more of a GPU whose clock is slower
_LONGEST = 0.5  # seconds; no call is queued for as long, but one that waits for the device

_Given = TypeVar("_Given")


@dataclass
class Window:
    """How long a device is kept busy, in which the host queues a whole call.

    It grows until it is longer than what the host takes.
    """

    seconds: float = 2e-3

    @property
    def in_vain(self) -> bool:
        """Whether a call does not end before the device has begun with it: it waits for it."""
        return self.seconds > _LONGEST


def seconds_of(
    clock: HostClock | EventClock,
    prepare: Callable[[], _Given],
    call: Callable[[_Given], object],
    window: Window | None = None,
) -> float:
    """The time of a call, given what `prepare` returns off the clock.

    With a window it is that of the device alone, and NaN where the call waits for the device.
    """
    while window is None or not window.in_vain:
        given = prepare()
        clock.ready(window)
        start = clock.mark()
        output = call(given)
        stop = clock.mark()
        behind = window is None or clock.is_behind(start)
        del given, output
        took = clock.seconds(start, stop)
        if window is None or behind:
            return took
        window.seconds *= 2
    return math.nan


def now(device: str) -> float:
    """Seconds on the host's clock, once the device has nothing left to do."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class HostClock:
    """A call finds the caches as the one before it left them."""

    def __init__(self, device: str) -> None:
        self._device = device

    def ready(self, window: Window | None) -> None:
        """Bring the device into the state that every timed call starts from.

        Args:
            window: let the host queue the call before the device begins with it, so that the
                device alone is timed; a host's clock cannot. None for an idle device.
        """
        assert window is None

    def mark(self) -> Any:
        """A point in time."""
        return now(self._device)

    def is_behind(self, mark: Any) -> bool:
        """Whether the device has still to come to a mark."""
        return False

    def seconds(self, start: Any, stop: Any) -> float:
        return stop - start


class EventClock:
    """CUDA events; a call finds an idle GPU whose second-level cache holds none of its data."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        # Twice the cache, so that all of it is overwritten.
        self._flush = torch.empty(max(2 * cache, 1 << 20), dtype=torch.int8, device=self._device)

    def ready(self, window: Window | None) -> None:
        self._flush.zero_()
        if window is not None:
            with torch.cuda.device(self._device):
                torch.cuda._sleep(int(window.seconds * _CYCLES))
        else:
            torch.cuda.synchronize(self._device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def is_behind(self, mark: torch.cuda.Event) -> bool:
        return not mark.query()

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


@functools.cache
def clock_of(device: str) -> HostClock | EventClock:
    """Events on CUDA and HIP, the host's clock elsewhere."""
    return EventClock(device) if has_events(device) else HostClock(device)


def has_events(device: str) -> bool:
    """Whether the device can be timed apart from the host."""
    return torch.device(device).type == "cuda"
