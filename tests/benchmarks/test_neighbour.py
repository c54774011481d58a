"""Training beside a busy process: what is measured, and with which settings."""

from __future__ import annotations

import json
import subprocess

import pytest

from benchmarks.step import neighbour


def test_each_setting_is_measured_alone_and_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    busy: list[bool] = []
    asked = []

    class Busy:
        def __enter__(self) -> None:
            busy.append(True)

        def __exit__(self, *_: object) -> None:
            busy.pop()

    def rate(count: int | None, threads: int, steps: int) -> float:
        asked.append((count, threads, bool(busy)))
        return 100.0 - 50 * bool(busy) + (count or 0)

    monkeypatch.setattr(neighbour, "busy_process", Busy)
    monkeypatch.setattr(neighbour, "rate", rate)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    rows = neighbour.measure((None, 7), steps=3, rounds=2)
    assert rows == [
        {"spin_count": "not set", "omp_threads": 4, "alone": 100.0, "beside": 50.0},
        {"spin_count": 7, "omp_threads": 4, "alone": 107.0, "beside": 57.0},
        {"spin_count": "not set", "omp_threads": 3, "alone": 100.0, "beside": 50.0},
    ]
    assert len(asked) == 12 and asked.count((7, 4, True)) == 2


def test_a_setting_reaches_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def run(command: list[str], env: dict[str, str], **_: object) -> object:
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, f"a line\n{json.dumps([3.0, 1.0, 2.0])}\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert neighbour.rate(None, 2, 9) == 2.0
    assert seen["OMP_NUM_THREADS"] == "2"
    assert not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & seen.keys()
    neighbour.rate(0, 1, 9)
    assert seen["GOMP_SPINCOUNT"] == "0"
