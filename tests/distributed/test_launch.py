"""One run on several processes: the results of one process with the same global batch."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mulki.app.cli import run_command
from mulki.app.commands.run_options import run_options
from mulki.distributed import launch, one_thread_gloo
from mulki.distributed.roll_call import Meeting
from mulki.errors import InputError
from mulki.train import sequence
from mulki.train.config.presets import RELATIONS
from mulki.train.config.run_config import resolve
from mulki.train.saving.recovery import read_state
from tests.ranks import run_ranks
from tests.train.distributed_runs import (
    ANCHORED,
    LAST,
    ON_REFERENCE,
    THEN_WAITS_S,
    WAITS_S,
    WORKER,
    command,
    compare,
    torchrun,
    torchruns,
)
from tests.train_helpers import same_state, write_pairs

# By name: options of the run, and images in a global batch.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "mulki": ({"method": "mulki", "anchors": "none", **RELATIONS, "gate": "uniform"}, 6),
    "micro": ({"method": "mulki", "micro_batch": "1", "prototype_update": "learnable"}, 6),
    # Teachers that are asked as images come up; the running mean, the anchor and clipping.
    "lwf": ({"method": "lwf", "grad_clip_norm": 0.1, "micro_batch": "auto"}, 6),
    # 10 images of the second task in a batch of 12: parts that are not equal.
    # The anchor is as strong as the other terms, to be seen.
    "whole": (
        {
            "method": "mulki",
            **RELATIONS,
            "gate": "uniform",
            "batch_size_eval": 2,
            "we_every": 2,
            "l2": 5.0,
            **ANCHORED,
        },
        12,
    ),
    # Without training, one pass over the images serves all rows.
    "zero-shot": ({"method": "zero_shot", "batch_size_eval": 2}, 6),
    # AdamW makes rounding errors larger, by lr / eps.
    "reference": (ON_REFERENCE | {"micro_batch": "2", "eps": 1e-2}, 6),
    # 10 images of the second task in a batch of 12, for three processes with two of them repeated.
    "crafted": ({"method": "crafted", "micro_batch": "3", "eps": 1e-2}, 12),
    # Anchors that student and teachers encode, some drawn for each step.
    "anchors": (
        {
            "method": "mulki",
            "anchors": "both",
            "anchor_texts": "student",
            "anchors_per_step": "7",
            "micro_batch": "2",
            **ANCHORED,
        },
        6,
    ),
    "zscl": (
        {"method": "zscl", "reference": "current", "micro_batch": "2", "we_every": "2", **ANCHORED},
        6,
    ),
    "snd": ({"method": "snd", "reference": "current", **ANCHORED}, 6),
    "wise": ({"method": "wise_ft", "wise_base": "zero_shot"}, 6),
    "er": ({"method": "er", "buffer_size": 7, "micro_batch": "2"}, 6),
    "validation": (
        {"method": "lwf", "augment": "crop", "val_fraction": 0.4, "val_every": 1, **ANCHORED},
        6,
    ),
    # 5 images for 2 processes.
    "ewc": ({"method": "ewc", "fisher_images": 5, **ANCHORED}, 6),
    "vocabulary": ({"method": "lwf_vr", "anchors_per_step": "7"}, 6),
    # The last batch has images for one process more than for the other.
    "keeplora": (
        {"method": "keeplora", "lora_rank": 3, "energy_image": 0.3, "shots": 5, **ANCHORED},
        6,
    ),
    "adapters": ({"method": "mulki", "lora_rank": 3, "micro_batch": "2", **ANCHORED}, 6),
    # 10 pairs of the second task in a batch of 12.
    "whole-reference": (ON_REFERENCE | {"eps": 1e-3, "lr": 1e-3}, 12),
}
DAILY = ("mulki", "whole", "reference", "ewc")


@pytest.mark.slow
def test_two_processes_are_one(base: dict[str, Any]) -> None:
    compare(base, {name: CASES[name] for name in DAILY}, 2)
    log = (Path(base["logs"]) / "mulki-2" / "out.log").read_text()
    assert "2 processes, 6 images in a batch" in log


@pytest.mark.long
def test_two_processes_are_one_in_the_other_cases(base: dict[str, Any], tmp_path: Path) -> None:
    # Both write what they read.
    kept = {"hold_on": "both", "anchors": "both", "teacher_cache": str(tmp_path / "cache")}
    # Seven test images: parts that are not equal.
    file = write_pairs(tmp_path, "flags", 7).rename(tmp_path / "colours.csv")
    tasks = [f"captions:{file}", base["tasks"][1]]
    captions = {"method": "mulki", "anchors": "none", "tasks": tasks, "micro_batch": "2"}
    of_this_test = {
        "cache": ({"method": "mulki", **kept}, 6),
        "captions": (captions | ANCHORED, 6),
    }
    compare(base, {name: of for name, of in CASES.items() if name not in DAILY} | of_this_test, 2)


@pytest.mark.long
def test_three_processes_are_one(base: dict[str, Any]) -> None:
    names = ("mulki", "whole", "crafted", "whole-reference")
    compare(base, {name: CASES[name] for name in names}, 3)


def learn_on_a_rank(rank: int, world: int, words: list[str]) -> None:
    from tests.train import distributed_worker  # noqa: F401 - figures take longer than the run

    sequence.run(resolve(run_options(words)[0]))


def go_on_on_a_rank(rank: int, world: int, folder: Path) -> None:
    from tests.train import distributed_worker  # noqa: F401

    assert run_command(["run", "--resume", str(folder)]) == 0


@pytest.fixture(scope="module")
def whole(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two processes, both of which reach its end."""
    logs = tmp_path_factory.mktemp("whole")
    run_ranks(2, learn_on_a_rank, command(base, logs, "whole")[1:])
    return logs / "whole"


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("mulki: error")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said", "more"),
    [
        ("raise", "blue/0.png: cannot be read", []),
        # Another backend of torch.
        pytest.param("crash", "ZeroDivisionError: ", ["--fsdp"], marks=pytest.mark.long),
    ],
)
def test_a_process_that_fails_ends_the_run_which_can_go_on(
    base: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    said: str,
    more: list[str],
) -> None:
    done = torchrun(2, str(WORKER), "--", fault, *command(base, tmp_path, "broken"), *more)
    assert done.returncode != 0
    (line,) = errors(done)
    assert line.startswith(f"mulki: error in process 1: {said}")
    folder = tmp_path / "broken"
    assert f"to go on: mulki run --resume {folder}" in done.stderr
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert "zero-shot" in (folder / "matrix.csv").read_text()
    assert "has failed: " + said in (folder / "out.log").read_text()
    if fault == "crash":
        return
    assert run_command(["run", "--resume", str(folder)]) == 2
    assert "2 processes, these are 1" in capsys.readouterr().err
    run_ranks(2, go_on_on_a_rank, folder)
    assert "goes on after 0 tasks and 2 steps" in (folder / "out.log").read_text()
    assert same_state(load_file(folder / LAST), load_file(whole / LAST))


@pytest.mark.long
def test_torchrun_goes_on_when_a_process_was_killed(
    base: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    given = command(base, tmp_path, "killed")
    done = torchrun(2, "--max-restarts=1", str(WORKER), "--", "kill", *given)
    assert done.returncode == 0, done.stderr
    (line,) = errors(done)
    assert re.match(r"mulki: error: process 1 \(pid \d+ on \S+\) did not answer .*: killed", line)
    folder = tmp_path / "killed"
    assert "goes on after 0 tasks and 2 steps" in (folder / "out.log").read_text()
    assert same_state(load_file(folder / LAST), load_file(whole / LAST))


@pytest.mark.long
def test_several_machines_go_on_when_a_process_was_killed(
    base: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    given = command(base, tmp_path, "killed")
    done = torchruns(2, "--max-restarts=2", str(WORKER), "--", "kill", *given)
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    folder = tmp_path / "killed"
    assert "goes on after 0 tasks and 2 steps" in (folder / "out.log").read_text()
    assert same_state(load_file(folder / LAST), load_file(whole / LAST))


@pytest.mark.long
def test_a_process_whose_disk_is_full_ends_the_run(base: dict[str, Any], tmp_path: Path) -> None:
    done = torchrun(2, str(WORKER), "--", "fill", *command(base, tmp_path, "full"))
    assert done.returncode != 0
    (line,) = errors(done)
    assert line.startswith("mulki: error in process 0: ") and "No space left" in line
    saved = read_state(tmp_path / "full")
    assert saved is not None and saved["learned"] == 0 and saved["in_task"]["steps"] == 2


@pytest.mark.long
def test_a_signal_to_one_process_ends_all_after_a_save(
    base: dict[str, Any], tmp_path: Path
) -> None:
    given = [*command(base, tmp_path, "stopped"), "--save-every", "0"]
    done = torchrun(2, str(WORKER), "--", "stop", *given)
    assert done.returncode != 0 and not errors(done)
    folder = tmp_path / "stopped"
    assert f"to go on: mulki run --resume {folder}" in done.stderr
    saved = read_state(folder)
    assert saved is not None and saved["learned"] == 0 and saved["in_task"]["steps"] == 3


@pytest.mark.long
def test_a_process_that_hangs_ends_the_run(base: dict[str, Any], tmp_path: Path) -> None:
    given = [*command(base, tmp_path, "hangs"), "--process-timeout", str(WAITS_S)]
    done = torchrun(2, str(WORKER), "--", "hang", *given)
    assert done.returncode != 0
    (line,) = errors(done)
    named = r"mulki: error: process 1 \(pid \d+ on \S+\) did not answer .*: killed, busy or"
    assert re.match(named, line) and f"Timed out waiting {THEN_WAITS_S}000ms" in line
    saved = read_state(tmp_path / "hangs")
    assert saved is not None and saved["learned"] == 0 and saved["in_task"]["steps"] == 2


def test_processes_of_a_machine_do_not_share_a_device_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launch.device_of_process(cuda) == cuda
    assert launch.processes_here() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launch.device_of_process(torch.device("cuda:1")) == torch.device("cuda:1")
    assert launch.device_of_process(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch.processes_here() == 4
    with pytest.raises(InputError, match="^--device: cuda:1 .* 4 processes"):
        launch.device_of_process(torch.device("cuda:1"))


def test_an_environment_that_is_not_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="RANK, MASTER_ADDR, MASTER_PORT "):
        launch.join(torch.device("cpu"))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(InputError, match="^RANK: got 2 where WORLD_SIZE is 2"):
        launch.join(torch.device("cpu"))


def test_sharded_models_on_cpus_have_a_gloo_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    met = Meeting(store, 0, 2, (["0", "", "here"], ["0", "", "there"]))
    asked: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "meeting", lambda: met)
    monkeypatch.setattr(launch, "_made", None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **of: asked.append(backend))
    for sharded in (False, True):
        launch.join(torch.device("cpu"), sharded=sharded)
    assert asked == ["gloo", one_thread_gloo.name()]


@pytest.mark.parametrize("value", ["x", "", "-1", "1.5"])
def test_an_environment_without_numbers(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.setenv(name, "1")
    for name, asks in (
        ("RANK", launch.meeting),
        ("MASTER_PORT", launch.meeting),
        ("LOCAL_RANK", lambda: launch.device_of_process(torch.device("cuda"))),
        ("LOCAL_WORLD_SIZE", launch.processes_here),
        ("WORLD_SIZE", launch.launched),
    ):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv(name, value)
        unset = "WORLD_SIZE" if name in ("RANK", "MASTER_PORT") else name
        with pytest.raises(InputError, match=f"^{name}: got '{value}', wanted.*or unset {unset}$"):
            asks()
        monkeypatch.setenv(name, "1")
