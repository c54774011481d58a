"""Models sharded over processes: what is sharded, and that they learn as whole ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError
from mulki.train import sequence, sharding
from mulki.train.config.presets import RELATIONS
from mulki.train.config.run_config import resolve
from tests.train.distributed_runs import (
    ANCHORED,
    LAST,
    ON_REFERENCE,
    WORKER,
    command,
    compare,
    torchrun,
)
from tests.train_helpers import same_state

SHARDED: dict[str, tuple[dict[str, Any], int]] = {
    "fsdp": (
        {
            "method": "mulki",
            **RELATIONS,
            "gate": "uniform",
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
    # AdamW makes rounding errors larger, by lr / eps.
    "fsdp-reference": (ON_REFERENCE | {"augment": "crop", "eps": 1e-2}, 6),
    "fsdp-micro-reference": (ON_REFERENCE | {"micro_batch": "2", "eps": 1e-2}, 6),
    "fsdp-crafted": ({"method": "crafted", "eps": 1e-2}, 6),
    "fsdp-micro-crafted": ({"method": "crafted", "micro_batch": "2", "eps": 1e-2}, 6),
    # Captions that no model, or the teacher alone, encodes.
    "fsdp-snd": ({"method": "snd", "reference": "current", "eps": 1e-2}, 6),
    "fsdp-zscl": ({"method": "zscl", "reference": "current", "we_every": "2", "eps": 1e-2}, 6),
    # A text tower that student and teachers share before they are sharded.
    "fsdp-locked": ({"method": "mulki", "lock_text": True, "grad_clip_norm": 0.1}, 6),
    "fsdp-er": ({"method": "er", "buffer_size": 7, "micro_batch": "2", "eps": 1e-2}, 6),
    "fsdp-adapters": (
        {"method": "mulki", "lora_rank": 3, "micro_batch": "2", "l2": 5.0, **ANCHORED},
        6,
    ),
}
DAILY = ("fsdp", "fsdp-lwf")


def test_every_block_of_a_tower_is_a_unit(load_tiny: Callable[..., VisionLanguageModel]) -> None:
    model = load_tiny()
    found = [block for tower in model.towers() for block in sharding._blocks(tower)]
    towers = (model.clip.visual.transformer, model.clip.transformer)
    assert found == [block for tower in towers for block in reversed(tower.resblocks)]


def test_a_block_comes_before_the_one_that_it_is_in() -> None:
    stage = nn.Sequential(OrderedDict(blocks=nn.Sequential(nn.Linear(2, 2))))
    tower = nn.Sequential(OrderedDict(stages=nn.Sequential(stage)))
    assert sharding._blocks(tower) == [stage.blocks[0], stage]


def test_a_block_without_parameters_is_no_unit() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Identity()])
    tower = nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 2)})
    assert sharding._blocks(tower) == [layers[0]]


@pytest.mark.slow
def test_sharded_models_learn_as_whole_ones(base: dict[str, Any]) -> None:
    compare(base, {name: SHARDED[name] for name in DAILY}, 2, fsdp=True)


@pytest.mark.long
def test_sharded_models_learn_as_whole_ones_in_the_other_cases(
    base: dict[str, Any], tmp_path: Path
) -> None:
    kept = {"hold_on": "both", "teacher_cache": str(tmp_path / "cache"), **ANCHORED}
    others = {name: case for name, case in SHARDED.items() if name not in DAILY}
    compare(base, others | {"fsdp-cache": ({"method": "mulki", **kept}, 6)}, 2, fsdp=True)


def test_sharding_needs_several_processes(base: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--fsdp: this is the only process"):
        sequence.run(resolve(base | {"fsdp": True, "name": "alone"}))
    with pytest.raises(InputError, match="--fsdp: method ewc needs whole gradients of weights"):
        sequence.run(resolve(base | {"fsdp": True, "name": "alone", "method": "ewc"}))
    with pytest.raises(InputError, match="FSDP wants one dtype; pass pure_bf16 or amp_bf16"):
        sequence.run(resolve(base | {"fsdp": True, "name": "alone", "precision": "bf16"}))
    assert not (Path(base["logs"]) / "alone").exists()


@pytest.mark.long
@pytest.mark.parametrize("own", [["--we-every", "2", "--alpha", "0.8"], ["--lora-rank", "3"]])
def test_a_sharded_run_goes_on_with_the_same_bits(
    base: dict[str, Any], tmp_path: Path, own: list[str]
) -> None:
    # Killed in the second task, whose previous model, anchor and running mean are sharded too.
    options = ["--fsdp", "--method", "mulki", "--l2", "5", *own]
    for name, fault, restarts in (("whole", [], 0), ("killed", [str(WORKER), "--", "kill@8"], 1)):
        given = [*command(base, tmp_path, name), *options]
        start = fault or ["-m", "mulki", "--"]
        done = torchrun(2, f"--max-restarts={restarts}", *start, *given)
        assert done.returncode == 0, done.stderr
    assert "goes on after 1 task and 7 steps" in (tmp_path / "killed" / "out.log").read_text()
    weights = [load_file(tmp_path / name / LAST) for name in ("killed", "whole")]
    assert same_state(*weights)
