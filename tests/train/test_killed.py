"""Runs that are killed, or asked to end, at any moment, and go on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.sweeps import swept
from tests.train.run_helpers import SHORT, check_same


@dataclass
class Killed:
    """The process of `killed_runs.py`."""

    process: subprocess.Popen[str]
    options: dict[str, Any]

    def run(
        self,
        name: str,
        *,
        resume: bool = False,
        counted: str = "kill_at_event",
        at: Sequence[int] = (),
        after: float | None = None,
        sent: Sequence[int] = (signal.SIGKILL,),
        loader_after: float | None = None,
        **options: Any,
    ) -> tuple[int, int]:
        """Exit status and count; the run gets the signals `sent` after some seconds.

        Args:
            counted, at: see `killed_runs.py`.
            loader_after: seconds after the first data loading process has begun, when those that
                there are then are killed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        options = self.options | options | {"name": name}
        folder = str(Path(options["logs"]) / name) if resume else None
        asked = {"options": options, "resume": folder, "counted": counted, "at": at}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if after is not None:
            for number in sent:
                time.sleep(after)
                with contextlib.suppress(ProcessLookupError):  # it has ended by then
                    os.kill(child, number)
                after = 0.01
        if loader_after is not None:
            kill_loaders(child, loader_after)
        status, seen = map(int, self.process.stdout.readline().split())
        return status, seen

    def finish(self, name: str, **options: Any) -> Path:
        """Go on with a run, or start it again if it had not begun; returns its folder."""
        folder = Path(self.options["logs"]) / name
        begun = (folder / "summary.json").is_file() and (folder / "args.yaml").is_file()
        assert self.run(name, resume=begun, **options)[0] == 0
        return folder


def kill_loaders(run: int, after: float) -> None:
    """Kill the processes that load data for a run, some seconds after the first has begun."""

    def loaders() -> list[str]:
        # They are forked; a run has other programs for children too.
        children = Path(f"/proc/{run}/task/{run}/children").read_text().split()
        return [each for each in children if name_of(each) == name_of(run)]

    def name_of(process: str | int) -> bytes:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{process}/cmdline").read_bytes()
        return b"ended"

    with contextlib.suppress(FileNotFoundError):  # the run ends
        while not loaders():
            time.sleep(0.001)
        time.sleep(after)
        for process in loaders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Killed]:
    yield from runs(tmp_path_factory.mktemp("killed"), start_model, task_folders)


def runs(
    folder: Path, start_model: dict[str, str], task_folders: tuple[str, str], **environment: str
) -> Iterator[Killed]:
    """The process that makes runs below a folder."""
    logs = str(folder)
    options = {**SHORT, **start_model, "tasks": list(task_folders), "logs": logs}
    # A locked text tower makes saves of kilobytes.
    options |= {"method": "mulki", "we_every": 2, "save_every": 1, "lock_text": True}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.killed_runs"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(options | {"name": "warm"}) + "\n")
    try:
        yield Killed(process, options)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def uninterrupted(killed: Killed) -> tuple[Path, float, int]:
    """The folder of a run that nothing stopped, its seconds, and its file-system events."""
    killed.run("first")
    started = time.monotonic()
    status, events = killed.run("whole")
    assert status == 0 and events > 100
    return Path(killed.options["logs"]) / "whole", time.monotonic() - started, events


needs_fork = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux")


@needs_fork
@pytest.mark.long
@pytest.mark.parametrize("trial", range(2))
def test_killed_at_a_random_moment(
    killed: Killed, uninterrupted: tuple[Path, float, int], trial: int
) -> None:
    folder, seconds, _ = uninterrupted
    moment = random.Random().uniform(0, 1.1 * seconds)
    print(f"killed after {moment:.4f} s")
    name = f"time-{trial}"
    assert killed.run(name, after=moment)[0] in (-signal.SIGKILL, 0)
    if (Path(killed.options["logs"]) / name / "matrix.csv").exists() and trial % 2:
        killed.run(name, resume=True, after=moment / 2)  # and once more
    killed.finish(name)
    check_same(folder.parent / name, folder)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "trial"),
    [
        ((signal.SIGTERM,), 0),
        pytest.param((signal.SIGTERM,), 1, marks=pytest.mark.long),
        pytest.param((signal.SIGINT, signal.SIGINT), 0, marks=pytest.mark.long),
        pytest.param((signal.SIGINT, signal.SIGINT), 1, marks=pytest.mark.long),
    ],
)
def test_asked_to_end_at_a_random_moment(
    killed: Killed, uninterrupted: tuple[Path, float, int], sent: Sequence[int], trial: int
) -> None:
    folder, seconds, _ = uninterrupted
    moment = random.Random().uniform(trial / 2 * seconds, (trial + 1) / 2 * seconds)
    print(f"{sent} after {moment:.4f} s")
    name = f"asked-{len(sent)}-{trial}"
    killed.run(name, after=moment, sent=sent)
    killed.finish(name)
    check_same(folder.parent / name, folder)


def check_killed_at(killed: Killed, whole: Path, event: int, **options: Any) -> None:
    name = f"event-{event}"
    assert killed.run(name, at=[event], **options)[0] == -signal.SIGKILL
    killed.finish(name, **options)
    check_same(whole.parent / name, whole)
    shutil.rmtree(whole.parent / name)


@pytest.fixture(scope="module")
def adapted(killed: Killed) -> tuple[Path, int, dict[str, Any]]:
    """The folder of a run with adapters and a cache of teachers, its events and its options."""
    options: dict[str, Any] = {"we_every": 0, "lora_rank": 2}
    # Its name begins with that of the run, so its events are counted too.
    cache = Path(killed.options["logs"]) / "adapted-cache"
    status, events = killed.run("adapted", teacher_cache=str(cache), **options)
    assert status == 0 and len([*cache.iterdir()]) >= 4
    return Path(killed.options["logs"]) / "adapted", events, options


@needs_fork
@pytest.mark.long
def test_a_run_with_adapters_and_a_cache_killed_at_every_event(
    killed: Killed, adapted: tuple[Path, int, dict[str, Any]]
) -> None:
    folder, events, options = adapted
    for number in swept(events, 40):
        cache = folder.with_name(f"event-{number}-cache")
        check_killed_at(killed, folder, number, teacher_cache=str(cache), **options)


@needs_fork
@pytest.mark.slow
def test_killed_at_a_file_system_event(
    killed: Killed, uninterrupted: tuple[Path, float, int]
) -> None:
    """At one of those that `make nightly` tries."""
    folder, _, events = uninterrupted
    number = random.Random().randint(1, events)
    print(f"killed at event {number} of {events}")
    check_killed_at(killed, folder, number)


@needs_fork
@pytest.mark.long
def test_killed_at_every_file_system_event(
    killed: Killed, uninterrupted: tuple[Path, float, int]
) -> None:
    folder, _, events = uninterrupted
    for number in swept(events, 20):
        check_killed_at(killed, folder, number)


# Transforms that draw are not cached, so processes load.
LOADED = {"workers": 1, "augment": "crop"}


def check_loader_killed(killed: Killed, whole: Path, trial: int, seconds: float) -> bool:
    """Kill the data loading process of a run at a random moment; whether that ended the run."""
    moment = random.Random().uniform(0, seconds)
    print(f"killed {moment:.4f} s after its begin")
    name = f"loader-{trial}"
    status, _ = killed.run(name, loader_after=moment, **LOADED)
    assert status in (0, 1)
    if status == 1:
        text = (whole.parent / f"{name}.error").read_text()
        assert text.startswith("InputError: --workers 1: a data loading process has ended"), text
    killed.finish(name, **LOADED)
    check_same(whole.parent / name, whole)
    shutil.rmtree(whole.parent / name)
    return status == 1


@pytest.fixture(scope="module")
def loaded(killed: Killed, uninterrupted: tuple[Path, float, int]) -> tuple[Path, float]:
    """The folder of a run with a data loading process, and its seconds; not the first run."""
    started = time.monotonic()
    assert killed.run("loaded", **LOADED)[0] == 0
    return Path(killed.options["logs"]) / "loaded", time.monotonic() - started


@needs_fork
@pytest.mark.long
def test_a_loader_killed_at_many_random_moments(killed: Killed, loaded: tuple[Path, float]) -> None:
    folder, seconds = loaded
    trials = 5 if os.environ.get("CI") else 50
    ended = [check_loader_killed(killed, folder, trial, seconds / 2) for trial in range(trials)]
    # Of five, chance may have ended none.
    assert sum(ended) > trials / 10 or trials == 5
