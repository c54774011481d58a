"""Runs on several processes, compared with the same run on one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mulki.distributed.world import World
from mulki.runs.answers import read_answers
from mulki.runs.metrics import read_matrix
from mulki.train.config.run_config import resolve
from mulki.train.sequence import run
from tests import ROOT
from tests.ranks import run_ranks

WORKER = Path(__file__).parent / "distributed_worker.py"
FIRST = "checkpoints/task_01_colours.safetensors"
LAST = "checkpoints/task_02_shades.safetensors"
ON_REFERENCE = {"method": "on_reference", "reference": "current"}
# Seconds that a process waits for one that is going to hang. On a busy machine one may start much
# later than another, so the second number holds from the third step on, where the one hangs.
WAITS_S, THEN_WAITS_S = 300, 3
ANCHORED = {"eps": 1e-2, "lr": 5e-3}


def torchrun(
    processes: int, *arguments: str, meeting: Sequence[str] = ("--rdzv-endpoint=localhost:0",)
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        + ["--master-port=0", "--rdzv-backend=c10d", *meeting, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,  # of a busy machine; seconds otherwise
        check=False,
    )


def torchruns(machines: int, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """One torchrun with one process for each of several machines, all of which are this one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = [f"--nnodes={machines}", "--rdzv-id=together", "--local-addr=127.0.0.1"]
    meeting.append(f"--rdzv-endpoint=127.0.0.1:{port}")
    with ThreadPoolExecutor(machines) as pool:
        started = [pool.submit(torchrun, 1, *arguments, meeting=meeting) for _ in range(machines)]
        return [each.result() for each in started]


def command(base: dict[str, Any], logs: Path, name: str) -> list[str]:
    """The arguments of a run of two tasks of five steps, with a save after each step."""
    return [
        "run", "--tasks", *base["tasks"], "--model", base["model"], "--name", name,
        "--logs", str(logs), "--device", "cpu", "--iterations", "5",
        "--batch-size", "3", "--precision", "fp32", "--save-every", "1",
    ]  # fmt: skip


def runs_on_a_rank(rank: int, size: int, runs: list[tuple[str, dict[str, Any]]]) -> None:
    from tests.train import distributed_worker  # which changes modules, for its own process

    world = World(rank, size)
    distributed_worker.check_micro_batches(world)
    distributed_worker.check_runs(runs, world)


def compare(
    base: dict[str, Any],
    cases: dict[str, tuple[dict[str, Any], int]],
    processes: int,
    **more: Any,
) -> None:
    """Run each case (options, images in a global batch) on several processes and on one.

    Matrices and last weights have to agree. `more` are options of the first kind of run alone.
    """
    runs = [
        (f"{name}-{processes}", base | options | more | {"batch_size": batch // processes})
        for name, (options, batch) in cases.items()
    ]
    run_ranks(processes, runs_on_a_rank, runs, sharded=bool(more.get("fsdp")))
    logs = Path(base["logs"])
    for name, (options, batch) in cases.items():
        if not (logs / name).exists():
            run(resolve(base | options | {"name": name, "batch_size": batch}))
        many = logs / f"{name}-{processes}"
        assert_same_results(many, logs / name)
        if options["method"] != "zero_shot":
            assert_same_weights(many, logs / name, logs / name / FIRST)


def assert_same_results(many: Path, one: Path) -> None:
    assert read_matrix(many / "matrix.csv") == read_matrix(one / "matrix.csv"), one.name
    assert_same_answers(many, one)


def assert_same_weights(many: Path, one: Path, before: Path) -> None:
    """The weights after the second task, which began with those in the file `before`."""
    weights, wanted = load_file(many / LAST), load_file(one / LAST)
    assert weights.keys() == wanted.keys(), one.name
    for key, value in weights.items():
        # Attention does not depend on the bias of its keys, whose gradient is rounding alone;
        # AdamW divides it by its own size.
        atol = 1e-4 if key.endswith("in_proj_bias") else 1e-5
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=atol, msg=f"{one.name} {key}")
    far = max(float((v - wanted[k]).abs().max()) for k, v in load_file(before).items())
    assert far > 1e-3, "the comparison would hold for models that did not train"


def assert_same_answers(many: Path, one: Path) -> None:
    found, wanted = read_answers(many), read_answers(one)
    assert found.keys() == wanted.keys(), one.name
    for after, row in found.items():
        for task, answers in row.items():
            other = wanted[after][task]
            where = f"{one.name}, {task} after {after}"
            assert answers.own.tolist() == other.own.tolist(), where
            assert (answers.seen is None) == (other.seen is None), where
            assert np.array_equal(answers.seen, other.seen), where  # type: ignore[arg-type]
            if answers.ranks is not None and other.ranks is not None:
                assert answers.ranks.texts.tolist() == other.ranks.texts.tolist(), where
    seen = [
        json.loads((path / "summary.json").read_text())["class_incremental"] for path in (many, one)
    ]
    classes = [any(each.seen is not None for each in row.values()) for row in found.values()]
    assert seen[0] == seen[1] and len(seen[0]["after"]) == sum(classes) > 0, one.name
