"""Programs of a kernel, run warp by warp from barrier to barrier, in an order that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.kernels.ptx.arithmetic import Lanes
from tests.kernels.ptx.memory import Fault, Global, Shared
from tests.kernels.ptx.steps import END, EVERY_LANE, PARTED, Code, Warp, masked


def _run_lanes(code: Code, warp: Warp, at: int, here: Lanes, stop: int) -> None:
    """Run some lanes of a warp until they reach an instruction, where others wait for them."""
    while at != stop:
        part, going = code.parts[at], here
        if part.guard is not None:
            going = here & (warp.registers[part.guard[0]] ^ part.guard[1])
        if part.branch is None:
            if going.any() and masked(warp, part, going) is not None:
                raise Fault("a barrier or an end that some lanes do not reach")
            at += 1
        elif (going == here).all() or not going.any():
            at = part.branch if going.any() else at + 1
        else:
            meeting = code.program.meeting(at)
            _run_lanes(code, warp, part.branch, going, meeting)
            _run_lanes(code, warp, at + 1, here & ~going, meeting)
            at = meeting


def run(
    code: Code,
    grid: int,
    warps: int,
    shared_bytes: int,
    parameters: Sequence[int],
    device: Global,
    backwards: bool = False,
) -> None:
    """Run all programs, one after the other.

    Raises:
        Fault: a race, an access beside a tensor, a barrier that not all warps reach.
        NotImplementedError: naming an instruction.
    """
    constants = list(code.constants)
    for name, value in zip(code.program.parameters, parameters, strict=True):
        constants[code.places[name, 0]] = value
    constants[code.places["%nctaid.x", 4]] = np.full(32, grid, np.uint32)
    for program in range(grid):
        device.program = program
        shared = Shared(shared_bytes, warps)
        constants[code.places["%ctaid.x", 4]] = np.full(32, program, np.uint32)
        running = []
        for number in range(warps):
            registers = list(constants)
            registers[code.places["%tid.x", 4]] = np.arange(32, dtype=np.uint32) + 32 * number
            running.append(Warp(number, registers, shared, device))
        if backwards:
            running.reverse()
        while (reached := {_to_barrier(code, warp) for warp in running}) != {END}:
            if len(reached) > 1:
                raise Fault("a barrier that some warps do not reach")
            shared.time += 1
            device.time += 1
        device.time += 1


def _to_barrier(code: Code, warp: Warp) -> int:
    steps, at = code.steps, warp.next
    try:
        while True:
            to = steps[at](warp)
            if to == PARTED:
                to = code.program.meeting(at)
                _run_lanes(code, warp, at, EVERY_LANE, to)
            at += 1
            if to is not None:
                if to < 0:
                    warp.next = at
                    return to
                at = to
    except Exception as error:
        where = f"{code.program.name}, warp {warp.number}, {code.program.instructions[at]}"
        kind = type(error) if isinstance(error, (Fault, NotImplementedError)) else RuntimeError
        raise kind(f"{error}: {where}") from error
