"""One run on several processes: the results of one process with the same global batch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mulki.answers import read_answers
from mulki.engine import distributed
from mulki.engine.config import resolve
from mulki.engine.sequence import run
from mulki.errors import InputError, ProcessLost
from mulki.metrics import read_matrix
from mulki.world import World
from tests.engine.reference_method import OnReference
from tests.engine_helpers import COLOURS, write_task

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "distributed_worker.py"
LAST = "checkpoints/task_02_shades.safetensors"

ON_REFERENCE = {"method": "on_reference", "reference": "current"}
ANCHORED = {"eps": 1e-3, "lr": 5e-3}
# By name: options of the run, and images in a global batch.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "mulki": ({"method": "mulki"}, 6),
    "micro": ({"method": "mulki", "micro_batch": "1", "prototype_update": "learnable"}, 6),
    # Teachers that are asked as images come up; the running mean, the anchor and clipping.
    "lwf": ({"method": "lwf", "grad_clip_norm": 0.1, "micro_batch": "auto"}, 6),
    # 10 images of the second task in a batch of 12: parts that are not equal.
    # The anchor is as strong as the other terms, to be seen.
    "whole": (
        {
            "method": "mulki",
            "batch_size_eval": 2,
            "we_every": 2,
            "l2": 5.0,
            **ANCHORED,
        },
        12,
    ),
    # Without training, one pass over the images serves all rows.
    "zero-shot": ({"method": "zero_shot", "batch_size_eval": 2}, 6),
    "crop": ({"method": "lwf", "augment": "crop"}, 6),
    "reference": (ON_REFERENCE | {"micro_batch": "2", "eps": 1e-3}, 6),
    # 10 pairs of the second task in a batch of 12. AdamW makes rounding errors larger, by lr / eps.
    "whole-reference": (ON_REFERENCE | {"eps": 1e-3, "lr": 1e-3}, 12),
}
SHARDED: dict[str, tuple[dict[str, Any], int]] = {
    "fsdp": (
        {
            "method": "mulki",
            "micro_batch": "2",
            "we_every": 2,
            "l2": 5.0,
            **ANCHORED,
            "alpha": 0.8,
            "grad_clip_norm": 0.1,
        },
        6,
    ),
    "fsdp-lwf": (
        {"method": "lwf", "augment": "crop", "micro_batch": "auto", "grad_checkpointing": True},
        6,
    ),
    "fsdp-reference": (ON_REFERENCE | {"augment": "crop", "eps": 1e-3}, 6),
    "fsdp-micro-reference": (ON_REFERENCE | {"micro_batch": "2", "eps": 1e-3}, 6),
}


@pytest.fixture(scope="module")
def base(
    start_model: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    root = tmp_path_factory.mktemp("distributed")
    shades = {"dark": (30, 30, 30), "light": (225, 225, 225)}
    tasks = write_task(root / "colours", COLOURS), write_task(root / "shades", shades, train=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnReference, "name", "on_reference", raising=False)
        yield {
            "tasks": [str(task) for task in tasks],
            "logs": str(root),
            "precision": "fp32",
            "iterations": 4,
            "lr": 1e-3,
            "eps": 1e-4,
            "device": "cpu",
            "batch_size_eval": 4,
            **start_model,
        }


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        + ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        + list(arguments),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def compare(
    base: dict[str, Any],
    cases: dict[str, tuple[dict[str, Any], int]],
    processes: int,
    path: Path,
    **more: Any,
) -> None:
    runs = [
        (f"{name}-{processes}", base | options | more | {"batch_size": batch // processes})
        for name, (options, batch) in cases.items()
    ]
    (path / "runs.json").write_text(json.dumps(runs))
    done = torchrun(processes, str(WORKER), str(path / "runs.json"))
    assert done.returncode == 0, done.stderr
    logs = Path(base["logs"])
    for name, (options, batch) in cases.items():
        if not (logs / name).exists():
            run(resolve(base | options | {"name": name, "batch_size": batch}))
        many = logs / f"{name}-{processes}"
        assert read_matrix(many / "matrix.csv") == read_matrix(logs / name / "matrix.csv")
        assert_same_answers(many, logs / name)
        if options["method"] == "zero_shot":
            continue
        weights, wanted = load_file(many / LAST), load_file(logs / name / LAST)
        assert weights.keys() == wanted.keys()
        for key, value in weights.items():
            # Attention does not depend on the bias of its keys, whose gradient is rounding alone;
            # AdamW divides it by its own size.
            atol = 1e-4 if key.endswith("in_proj_bias") else 1e-5
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=atol, msg=f"{name} {key}")
        moved = load_file(logs / name / "checkpoints/task_01_colours.safetensors")
        far = max(float((v - wanted[k]).abs().max()) for k, v in moved.items())
        assert far > 1e-3, "the comparison would hold for models that did not train"


def assert_same_answers(many: Path, one: Path) -> None:
    found, wanted = read_answers(many), read_answers(one)
    assert found.keys() == wanted.keys()
    for after, row in found.items():
        for name, answers in row.items():
            other = wanted[after][name]
            assert answers.own.tolist() == other.own.tolist()
            assert (answers.seen is None) == (other.seen is None)
            assert np.array_equal(answers.seen, other.seen)  # type: ignore[arg-type]
    seen = [
        json.loads((path / "summary.json").read_text())["class_incremental"] for path in (many, one)
    ]
    assert seen[0] == seen[1] and len(seen[0]["after"]) == 2


@pytest.mark.slow
def test_two_processes_are_one(base: dict[str, Any], tmp_path: Path) -> None:
    compare(base, CASES, 2, tmp_path)
    log = (Path(base["logs"]) / "mulki-2" / "out.log").read_text()
    assert "2 processes, 6 images in a batch" in log


@pytest.mark.slow
def test_three_processes_are_one(base: dict[str, Any], tmp_path: Path) -> None:
    compare(
        base, {name: CASES[name] for name in ("mulki", "whole", "whole-reference")}, 3, tmp_path
    )


@pytest.mark.slow
def test_sharded_models_learn_as_whole_ones(base: dict[str, Any], tmp_path: Path) -> None:
    compare(base, SHARDED, 2, tmp_path, fsdp=True)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run(base: dict[str, Any], tmp_path: Path) -> None:
    done = torchrun(
        2, str(WORKER), "--", "fail", "run", "--tasks", *base["tasks"], "--model", base["model"],
        "--logs", str(tmp_path), "--name", "broken", "--device", "cpu", "--iterations", "5",
        "--batch-size", "3", "--precision", "fp32",
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("mulki: error")]
    assert "mulki: error in process 1: blue/0.png: cannot be read" in lines, done.stderr
    others = [line for line in lines if "process 1" not in line]
    assert all("another process of the run has ended" in line for line in others)
    assert json.loads((tmp_path / "broken" / "summary.json").read_text())["status"] == "interrupted"
    assert "zero-shot" in (tmp_path / "broken" / "matrix.csv").read_text()


def test_one_process_is_a_world_of_its_own() -> None:
    world, rows = World(), torch.eye(3)
    assert world.rows(3) == [0, 1, 2] and world.distinct(3) == 3
    assert world.gather(rows, 3) is rows and world.part(rows) is rows
    assert world.total(3, 4, device=torch.device("cpu")) == [3, 4]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_parts_are_equal_and_cover_all(size: int, count: int) -> None:
    parts = [World(rank, size) for rank in range(size)]
    assert len({len(w.rows(count)) for w in parts}) == 1
    rows = [row for w in parts for row in w.rows(count)]
    assert rows[:count] == list(range(count)) and set(rows[count:]) <= {count - 1}
    assert [w.rows(count)[: w.distinct(count)] for w in parts] == [
        [r for r in range(count) if r // len(w.rows(count)) == w.rank] for w in parts
    ]


def test_only_a_launched_process_gets_a_device_by_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.device_of_process(cuda) == cuda
    assert distributed.processes_here() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed.device_of_process(cuda) == torch.device("cuda:3")
    assert distributed.device_of_process(torch.device("cuda:1")) == torch.device("cuda:1")
    assert distributed.device_of_process(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(InputError, match="3 GPUs and this is its process number 4.*per-node 3"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        distributed.device_of_process(cuda)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert distributed.processes_here() == 4
    with pytest.raises(InputError, match="--device: cuda:1 is one device.*has 4 processes"):
        distributed.device_of_process(torch.device("cuda:1"))


def test_an_environment_that_is_not_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="RANK, MASTER_ADDR, MASTER_PORT not set.*torchrun"):
        distributed.join(torch.device("cpu"))


def test_only_a_broken_connection_is_a_lost_process() -> None:
    closed = "[/gloo/pair.cc:5] Connection closed by peer"
    with pytest.raises(ProcessLost, match="has ended.*" + re.escape(closed)), World(0, 2):
        raise RuntimeError(closed + "\nmore")
    with pytest.raises(ProcessLost), World(0, 2):
        raise torch.distributed.DistBackendError("NCCL error")
    for error in (torch.OutOfMemoryError("no more"), RuntimeError("sizes differ")):
        with pytest.raises(type(error)), World(0, 2):
            raise error


def test_alone_a_problem_is_raised() -> None:
    world, cpu = World(), torch.device("cpu")
    world.agree(cpu, None, tasks="two")
    with pytest.raises(InputError, match="taken"):
        world.agree(cpu, InputError("taken"))


def test_sharding_needs_several_processes(base: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--fsdp: this is the only process"):
        run(resolve(base | {"fsdp": True, "name": "alone"}))
    assert not (Path(base["logs"]) / "alone").exists()
