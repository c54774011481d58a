"""A process that makes tiny runs, each in a child that a test kills: `python killed_runs.py`.

The first line of its input holds the options of a run that it makes itself, as a JSON object. Each
other line is a JSON object: the options of a run, `resume` (a folder or null), `counted` (what is
counted in the run, a name of `COUNTERS`) and `at` (the number at which it fails, and for system
calls the error; empty or zeros where it does not). The answer is a line with its process id, and at
its end one with its exit status and the count. The error that ends a run is written to a file, its
name and `.error`. Children are forked from one process that has made a run already, so one takes a
fraction of a second. One thread: those of OpenMP do not outlive a fork.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import mulki
from mulki.train import sequence
from mulki.train.config.run_config import resolve

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
# Files whose calls take part in saving.
_SAVING = tuple(
    str(Path(mulki.__file__).parent / name)
    for name in ("train/saving/", "runs/", "files.py", "clip/tensor_files.py")
)
# How often a line that is reached again counts. The first save of a run has no older one to lose.
_TIMES = 3


@contextmanager
def kill_at_event(folder: str, counter: int, at: list[int]) -> Iterator[None]:
    """Count file-system events in a folder, and kill this process at one of them."""
    seen, counts = 0, True

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        # A file is opened by its name, and renamed from one name to another.
        if counts and event in _EVENTS and any(str(a).startswith(folder) for a in arguments[:2]):
            seen += 1
            os.pwrite(counter, b"%8d" % seen, 0)
            if [seen] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)
    try:
        yield
    finally:
        counts = False


@contextmanager
def fail_system_call(folder: str, counter: int, at: list[int]) -> Iterator[None]:
    """Count system calls that write in a folder; one fails with an error, see `faults.c`."""
    shim = ctypes.CDLL(None)
    shim.fault_arm(folder.encode(), *at)
    try:
        yield
    finally:
        os.pwrite(counter, b"%8d" % shim.fault_count(), 0)
        shim.fault_arm(b"", 0, 0)


@contextmanager
def fail_allocation(folder: str, counter: int, at: list[int]) -> Iterator[None]:
    """Count calls from the lines that save, in Python and in C; one is a MemoryError instead."""
    seen, times = 0, Counter[tuple[str, int, str]]()

    def see(frame: FrameType, event: str, argument: object) -> None:
        nonlocal seen
        line = frame.f_code.co_filename, frame.f_lineno, event
        if event not in ("call", "c_call") or not line[0].startswith(_SAVING):
            return
        times[line] += 1
        if times[line] <= _TIMES:
            seen += 1
            if [seen] == at:
                raise MemoryError(f"{line[0]}, line {line[1]}")

    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None)
        os.pwrite(counter, b"%8d" % seen, 0)


COUNTERS = {each.__name__: each for each in (kill_at_event, fail_system_call, fail_allocation)}


def child(asked: dict[str, Any], counter: int) -> None:
    """Make one run."""
    torch.set_num_threads(1)
    options, resume = asked["options"], asked["resume"]
    folder = os.path.join(options["logs"], options["name"])
    try:
        with COUNTERS[asked["counted"]](folder, counter, asked["at"]):
            sequence.run(resolve(options), resume=resume)
    except BaseException as error:
        with open(f"{folder}.error", "w", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}")
        raise


def main() -> None:
    torch.set_num_threads(1)
    counter = os.memfd_create("events")
    sequence.run(resolve(json.loads(sys.stdin.readline())))
    for line in sys.stdin:
        os.pwrite(counter, b"%8d" % 0, 0)
        process = os.fork()
        if process == 0:
            status = 1
            try:
                child(json.loads(line), counter)
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(status)
        print(process, flush=True)
        _, waited = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(waited), int(os.pread(counter, 8, 0)), flush=True)


if __name__ == "__main__":
    main()
