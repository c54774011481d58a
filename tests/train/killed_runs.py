"""A process that makes tiny runs, each in a child that a test kills: `python killed_runs.py`.

The first line of its input holds the options of a run that it makes itself, as a JSON object. Each
other line is a JSON object: the options of a run, `resume` (a folder or null), `events` (after so
many file-system events in the folder of the run the child is killed, or null) and `fault` (the
number of the system call that fails and its error, see `faults.c`, or null).
The answer is a line with its process id, and at its end one with its exit status and the number of
events, or of calls. What a fault does to a run is written to a file, its name and `.error`.
Children are forked from one process that has made a run already, so one takes a fraction of a
second. One thread: those of OpenMP do not outlive a fork.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

import torch

from mulki.train import sequence
from mulki.train.config.run_config import resolve

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def watch(folder: str, kill_at: int | None, counter: int) -> None:
    """Write the number of events to a file descriptor, and kill this process at one of them."""
    seen = 0

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        # A file is opened by its name, and renamed from one name to another.
        if event in _EVENTS and any(str(a).startswith(folder) for a in arguments[:2]):
            seen += 1
            os.pwrite(counter, b"%8d" % seen, 0)
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)


def child(asked: dict[str, Any], counter: int) -> None:
    """Make one run."""
    torch.set_num_threads(1)
    options, resume = asked["options"], asked["resume"]
    folder = os.path.join(options["logs"], options["name"])
    if asked["fault"] is None:
        watch(folder, asked["events"], counter)
        sequence.run(resolve(options), resume=resume)
        return
    shim = ctypes.CDLL(None)
    shim.fault_arm(folder.encode(), *asked["fault"])
    try:
        sequence.run(resolve(options), resume=resume)
    except BaseException as error:
        shim.fault_arm(b"", 0, 0)
        with open(f"{folder}.error", "w", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}")
        raise
    finally:
        os.pwrite(counter, b"%8d" % shim.fault_count(), 0)


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
