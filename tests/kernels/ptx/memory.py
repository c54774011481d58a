"""Memory of a program and of the device: every access within bounds, aligned, and without a race.

A race is two warps that touch the same byte between two barriers, one of them writing; or two
programs that do so at all. Shared memory is full of NaN at first.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from tests.kernels.ptx.arithmetic import Lanes

NEVER = -1


class Fault(Exception):
    """An access that no kernel may make, or a race."""


class Accesses:
    """Who touched each byte, and when: agents are warps, or programs."""

    def __init__(self, size: int, agents: int, what: str) -> None:
        self.what, self.width = what, agents + 1  # one more stands for several
        self.writes = np.full(size, NEVER, np.int64)
        self.reads = np.full(size, NEVER, np.int64)

    def read(self, at: Lanes, time: int, agent: int) -> None:
        self._check(self.writes[at], time, agent, "reads what another one writes")
        own, last = time * self.width + agent, self.reads[at]
        others = (last // self.width == time) & (last != own)
        self.reads[at] = np.where(others, (time + 1) * self.width - 1, own)

    def write(self, at: Lanes, time: int, agent: int, changed: Lanes) -> None:
        """Two agents may write the same value, as the compiler has it where threads are left."""
        self._check(self.reads[at], time, agent, "writes what another one reads")
        by_others = self._check(
            self.writes[at], time, agent, "writes what another one wrote", changed
        )
        self.writes[at[~by_others]] = time * self.width + agent

    def _check(
        self, last: Lanes, time: int, agent: int, doing: str, where: Lanes | bool = True
    ) -> Lanes:
        by_others = (last // self.width == time) & (last != time * self.width + agent)
        if (by_others & where).any():
            raise Fault(f"a race: {self.what} {agent} {doing}, without a barrier between them")
        return by_others


class Region:
    """Bytes from an address on; what is before `first` is there to be aligned."""

    def __init__(self, start: int, data: Lanes, first: int = 0, last: int | None = None) -> None:
        self.start, self.first = start, first
        self.last = len(data) if last is None else last
        self.views = {size: data.view(f"u{size}") for size in (1, 2, 4, 8)}

    def offsets(self, addresses: Lanes, size: int) -> Lanes:
        at = addresses.astype(np.int64) - self.start
        if (at % size).any():
            raise Fault(f"an address that is no multiple of {size} bytes")
        if (at < self.first).any() or (at + size > self.last).any():
            raise Fault(f"an access beside its tensor, at {at.min()} to {at.max()} + {size} bytes")
        return at

    def load(self, at: Lanes, size: int, count: int) -> list[Lanes]:
        view, place = self.views[size], at // size
        return [view[place + i] for i in range(count)]

    def store(self, at: Lanes, size: int, values: list[Lanes], touched: Lanes) -> Lanes:
        """Which of the touched bytes have another value now."""
        view, place = self.views[size], at // size
        before = self.views[1][touched]
        for i, value in enumerate(values):
            view[place + i] = value
        return before != self.views[1][touched]


def every_byte(at: Lanes, size: int) -> Lanes:
    return (at[:, None] + np.arange(size)).reshape(-1)


class Shared:
    """The shared memory of a program."""

    def __init__(self, size: int, warps: int) -> None:
        self.region = Region(0, np.full(max(size, 16) // 4, 0x7FC0BEAF, np.uint32).view(np.uint8))
        self.accesses = Accesses(max(size, 16), warps, "warp")
        self.coming = np.zeros(max(size, 16), np.bool_)  # copies that nobody has waited for
        self.time = 0

    def load(self, warp: int, addresses: Lanes, size: int, count: int) -> list[Lanes]:
        at = self.region.offsets(addresses, size * count)
        self._touch(at, size * count)
        self.accesses.read(every_byte(at, size * count), self.time, warp)
        return self.region.load(at, size, count)

    def store(self, warp: int, addresses: Lanes, size: int, values: list[Lanes]) -> None:
        at = self.region.offsets(addresses, size * len(values))
        self._touch(at, size * len(values))
        touched = every_byte(at, size * len(values))
        changed = self.region.store(at, size, values, touched)
        self.accesses.write(touched, self.time, warp, changed)

    def begin_copy(self, warp: int, addresses: Lanes, size: int) -> None:
        """What comes may be written at once, or as late as when it is waited for."""
        at = self.region.offsets(addresses, size)
        self._touch(at, size)
        touched = every_byte(at, size)
        self.accesses.write(touched, self.time, warp, np.ones_like(touched, np.bool_))
        self.coming[touched] = True

    def end_copy(self, warp: int, addresses: Lanes, values: list[Lanes]) -> None:
        size = 4 * len(values)
        self.coming[every_byte(self.region.offsets(addresses, size), size)] = False
        self.store(warp, addresses, 4, values)

    def _touch(self, at: Lanes, size: int) -> None:
        if self.coming[every_byte(at, size)].any():
            raise Fault("an access to what cp.async writes, before it was waited for")


class Global:
    """The tensors of a launch, where they are, and nothing else."""

    def __init__(self, tensors: Iterable[Tensor], programs: int, warps: int) -> None:
        extents = sorted((t.data_ptr(), t.data_ptr() + _bytes(t)) for t in tensors if t.numel())
        self.regions: list[Region] = []
        self.starts: list[int] = []
        self.of_warps: list[Accesses] = []
        self.of_programs: list[Accesses] = []
        for start, stop in _merged(extents):
            low, high = start // 16 * 16, -(-stop // 16) * 16
            raw = (ctypes.c_uint8 * (high - low)).from_address(low)
            data = np.frombuffer(raw, np.uint8)
            self.regions.append(Region(low, data, start - low, stop - low))
            self.starts.append(start)
            self.of_warps.append(Accesses(high - low, warps, "warp"))
            self.of_programs.append(Accesses(high - low, programs, "program"))
        self.time, self.program = 0, 0

    def load(self, warp: int, addresses: Lanes, size: int, count: int) -> list[Lanes]:
        region, at = self._find(addresses, size * count)
        touched = every_byte(at, size * count)
        self.of_warps[region].read(touched, self.time, warp)
        self.of_programs[region].read(touched, 0, self.program)
        return self.regions[region].load(at, size, count)

    def store(self, warp: int, addresses: Lanes, size: int, values: list[Lanes]) -> None:
        region, at = self._find(addresses, size * len(values))
        touched = every_byte(at, size * len(values))
        changed = self.regions[region].store(at, size, values, touched)
        self.of_warps[region].write(touched, self.time, warp, changed)
        self.of_programs[region].write(touched, 0, self.program, changed)

    def _find(self, addresses: Lanes, size: int) -> tuple[int, Lanes]:
        region = bisect_right(self.starts, int(addresses[0])) - 1
        if region < 0:
            raise Fault("an access beside all tensors")
        return region, self.regions[region].offsets(addresses, size)


def _bytes(t: Tensor) -> int:
    places = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return places * t.element_size()


def _merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in extents:
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged
