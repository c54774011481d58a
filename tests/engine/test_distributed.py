"""One run on several processes: the results of one process with the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mulki.cli import run_command
from mulki.engine import distributed
from mulki.errors import InputError
from tests.engine.distributed_runs import ANCHORED, LAST, ON_REFERENCE, WORKER, compare, torchrun
from tests.engine_helpers import same_state

# By name: options of the run, and images in a global batch.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "mulki": ({"method": "mulki", "anchors": "none"}, 6),
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
    # AdamW makes rounding errors larger, by lr / eps.
    "reference": (ON_REFERENCE | {"micro_batch": "2", "eps": 1e-2}, 6),
    # Anchors that student and teachers encode, some drawn for each step.
    "anchors": (
        {
            "method": "mulki",
            "anchors": "both",
            "anchor_texts": "student",
            "anchors_per_step": "7",
            "micro_batch": "2",
        },
        6,
    ),
    "zscl": (
        {"method": "zscl", "reference": "current", "micro_batch": "2", "we_every": "2", **ANCHORED},
        6,
    ),
    "snd": ({"method": "snd", "reference": "current", **ANCHORED}, 6),
    "wise": ({"method": "wise_ft", "wise_base": "zero_shot"}, 6),
    "vocabulary": ({"method": "lwf_vr", "anchors_per_step": "7"}, 6),
    # 10 pairs of the second task in a batch of 12.
    "whole-reference": (ON_REFERENCE | {"eps": 1e-3, "lr": 1e-3}, 12),
}


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
def test_a_process_that_fails_ends_the_run_which_can_go_on(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (
        "run", "--tasks", *base["tasks"], "--model", base["model"],
        "--logs", str(tmp_path), "--device", "cpu", "--iterations", "5",
        "--batch-size", "3", "--precision", "fp32", "--save-every", "1",
    )  # fmt: skip
    done = torchrun(2, str(WORKER), "--", "fail", *given, "--name", "broken")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("mulki: error")]
    assert "mulki: error in process 1: blue/0.png: cannot be read" in lines, done.stderr
    others = [line for line in lines if "process 1" not in line]
    assert all("another process of the run has ended" in line for line in others)
    assert json.loads((tmp_path / "broken" / "summary.json").read_text())["status"] == "interrupted"
    assert "zero-shot" in (tmp_path / "broken" / "matrix.csv").read_text()

    alone = run_command(["run", "--resume", str(tmp_path / "broken")])
    assert alone == 2 and "2 processes, these are 1" in capsys.readouterr().err
    for words in (("run", "--resume", str(tmp_path / "broken")), (*given, "--name", "whole")):
        done = torchrun(2, "-m", "mulki", "--", *words)
        assert done.returncode == 0, done.stderr
    assert "goes on after 0 tasks and 2 steps" in (tmp_path / "broken" / "out.log").read_text()
    assert same_state(load_file(tmp_path / "broken" / LAST), load_file(tmp_path / "whole" / LAST))


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
