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
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
#: Beyond its time, in which a step ends by itself: then it hangs.
GRACE = 60.0
#: A step that has less is not started.
LEAST = 5.0

Commands = Mapping[str, Sequence[str]]  # by the name of the log
Status = Literal["ok", "failed", "skipped"]

# Lines of a log that belong in the summary.
_TOLD = (
    re.compile(r"^(left out: .*)"),
    re.compile(r"^(FAILED .*|ERROR .*)"),
    re.compile(r"^(SKIPPED .*)"),
    re.compile(r"^(=+ )?(\d+ (?:passed|failed|skipped|error).* in [\d.]+s.*?)( =+)?$"),
    re.compile(r"^.*: (failed: .*)"),
    re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)"),
)


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
    remarks = [line for name, code in ended.items() for line in _remarks(out, name, code, took)]
    failed = any(code != 0 for code in ended.values())
    return Outcome(step.name, "failed" if failed else "ok", took, tuple(remarks))


def _remarks(out: Path, name: str, code: int | None, took: float) -> list[str]:
    path = out / f"{name}.log"
    text = path.read_text(encoding="utf-8", errors="replace")
    found: dict[str, None] = {}
    for line in text.splitlines():
        for pattern in _TOLD:
            if match := pattern.match(line):
                found[next(g for g in match.groups() if g and not g.startswith("="))] = None
                break
    if code is None:
        found[f"did not end within {took:.0f} s and was killed"] = None
    elif code != 0:
        found[f"exit status {code}"] = None
    return [f"{path.name}: {words}" for words in found]


def summary(outcomes: Sequence[Outcome], machine: str, seconds: float) -> str:
    """What ran, what failed, what was skipped and why."""
    counts = {s: sum(o.status == s for o in outcomes) for s in ("ok", "failed", "skipped")}
    lines = [
        f"benchmarks/gpu.sh on {machine}: "
        f"{', '.join(f'{count} {status}' for status, count in counts.items())} in {seconds:.0f} s",
        "",
    ]
    for o in outcomes:
        took = f"{o.seconds:.0f} s" if o.status != "skipped" else "-"
        lines.append(f"{o.status:<8}  {o.name:<12}  {took:>6}")
        lines += [f"          {remark}" for remark in o.remarks]
    return "\n".join(lines) + "\n"
