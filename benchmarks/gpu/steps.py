"""Steps: commands with a log each and a time, and what is said of them in the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from benchmarks.gpu.races import false_alarms

ROOT = Path(__file__).resolve().parents[2]
#: Beyond its time, in which a step ends by itself: then it hangs.
GRACE = 60.0
#: A step that has less is not started.
LEAST = 5.0

Commands = Mapping[str, Sequence[str]]  # by the name of the log
Status = Literal["failed", "out of time", "warning", "ok", "skipped"]  # the worst first
STATUSES: tuple[Status, ...] = get_args(Status)

# Lines of a log that belong in the summary.
_TOLD = (
    re.compile(r"^(left out: .*)"),
    re.compile(r"^(FAILED .*|ERROR .*)"),
    re.compile(r"^(SKIPPED .*)"),
    re.compile(r"^(=+ )?(\d+ (?:passed|failed|skipped|error).* in [\d.]+s.*?)( =+)?$"),
    re.compile(r"^.*: (failed: .*)"),
    re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)"),
    re.compile(r"^=+ ((?:Error|Warning): .*)", re.IGNORECASE),
)
# What a command says that ended by itself, before it had done all.
_OUT_OF_TIME = re.compile(r"^(left out: .*(out of time|beyond --budget)|SKIPPED .*: out of time$)")
_MOST_REMARKS = 20  # of a log; the others are in it


@dataclass(frozen=True)
class Step:
    """Commands that run at the same time."""

    name: str
    seconds: float  # that it may take, if they are left
    commands: Callable[[float], Commands]  # given the seconds that it has
    skip: str | None = None  # why it is not run
    keeps: float = 0.0  # seconds that it leaves to later steps


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    status: Status
    seconds: float
    remarks: tuple[str, ...]


def run_step(
    step: Step, out: Path, left: float, variables: Mapping[str, str], grace: float = GRACE
) -> Outcome:
    """Run a step in at most `left` seconds, and `grace` more for what it has begun.

    Each command is a process group of its own, and ends with it. Its output goes to a log in `out`.
    MULKI_GPU_DEADLINE tells the commands when they should be done.
    """
    if step.skip is not None:
        return Outcome(step.name, "skipped", 0.0, (step.skip,))
    seconds = min(step.seconds, left - step.keeps)
    if seconds < LEAST:
        return Outcome(step.name, "skipped", 0.0, ("no time is left; give more by --seconds",))
    start = time.monotonic()
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "MULKI_GPU_DEADLINE": str(time.time() + seconds),
        **variables,
    }
    started: dict[str, subprocess.Popen[bytes]] = {}
    ended: dict[str, int | None] = {}
    try:
        for name, command in step.commands(seconds).items():
            with (out / f"{name}.log").open("wb") as log:
                started[name] = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        for name, process in started.items():
            limit = start + seconds + grace - time.monotonic()
            try:
                ended[name] = process.wait(max(limit, 0.0))
            except subprocess.TimeoutExpired:
                ended[name] = None
    finally:
        for process in started.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    took = time.monotonic() - start
    judged = [_judged(out / f"{name}.log", code, took) for name, code in ended.items()]
    status = min((status for status, _ in judged), key=STATUSES.index)
    return Outcome(step.name, status, took, tuple(line for _, lines in judged for line in lines))


def _judged(path: Path, code: int | None, took: float) -> tuple[Status, list[str]]:
    """What became of a command, and what is said of it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found: dict[str, None] = {}
    for line in text.splitlines():
        for pattern in _TOLD:
            if match := pattern.match(line):
                found[next(g for g in match.groups() if g and not g.startswith("="))] = None
                break
    told = list(found)[:_MOST_REMARKS]
    if len(found) > len(told):
        told.append(f"{len(found) - len(told)} more lines of this kind")
    alarms = false_alarms(text) if code else 0
    status: Status = "ok"
    if code is None:
        status = "failed"
        told.append(f"did not end within {took:.0f} s and was killed")
    elif alarms:
        status = "warning"
        told.append(f"{alarms} races of a write with itself: the known false alarm on reductions")
    elif code != 0:
        status = "failed"
        told.append(f"exit status {code}")
    if status != "failed" and any(map(_OUT_OF_TIME.match, text.splitlines())):
        status = "out of time"
    return status, [f"{path.name}: {words}" for words in told]


def summary(outcomes: Sequence[Outcome], machine: str, seconds: float) -> str:
    """What ran, what failed, what had too little time, what was skipped and why."""
    counts = {status: sum(o.status == status for o in outcomes) for status in STATUSES}
    words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    lines = [
        f"benchmarks/gpu.sh on {machine}: {words} in {seconds:.0f} s",
        "",
    ]
    for o in outcomes:
        took = f"{o.seconds:.0f} s" if o.status != "skipped" else "-"
        lines.append(f"{o.status:<11}  {o.name:<12}  {took:>6}")
        lines += [f"{'':<13}{remark}" for remark in o.remarks]
    return "\n".join(lines) + "\n"
