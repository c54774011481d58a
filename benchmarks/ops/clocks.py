"""What time is read from: the host's clock, or events on a GPU's stream."""

from __future__ import annotations

import functools
import time
from typing import Any, Protocol

import torch

# A GPU spins for about two milliseconds, in which the host queues a whole call.
_SPIN_CYCLES = 4_000_000


class Clock(Protocol):
    """Marks points in time, and tells the seconds between two of them."""

    def ready(self, ahead: bool) -> None:
        """Bring the device into the state that every timed call starts from.

        Args:
            ahead: let the host queue the call before the device begins with it, so that the
                device alone is timed; a host's clock cannot.
        """

    def mark(self) -> Any: ...

    def seconds(self, start: Any, stop: Any) -> float: ...


def now(device: str) -> float:
    """Seconds on the host's clock, once the device has nothing left to do."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class HostClock:
    """A call finds the caches as the one before it left them."""

    def __init__(self, device: str) -> None:
        self._device = device

    def ready(self, ahead: bool) -> None:
        assert not ahead

    def mark(self) -> float:
        return now(self._device)

    def seconds(self, start: float, stop: float) -> float:
        return stop - start


class EventClock:
    """CUDA events; a call finds an idle GPU whose second-level cache holds none of its data."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        # Twice the cache, so that all of it is overwritten.
        self._flush = torch.empty(max(2 * cache, 1 << 20), dtype=torch.int8, device=self._device)

    def ready(self, ahead: bool) -> None:
        self._flush.zero_()
        if ahead:
            with torch.cuda.device(self._device):
                torch.cuda._sleep(_SPIN_CYCLES)
        else:
            torch.cuda.synchronize(self._device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


@functools.cache
def clock_of(device: str) -> Clock:
    """Events on CUDA and HIP, the host's clock elsewhere."""
    return EventClock(device) if has_events(device) else HostClock(device)


def has_events(device: str) -> bool:
    """Whether the device can be timed apart from the host."""
    return torch.device(device).type == "cuda"
