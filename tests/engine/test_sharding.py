"""Models sharded over processes: what is sharded, and that they learn as whole ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mulki.engine import sharding
from mulki.engine.config import resolve
from mulki.engine.sequence import run
from mulki.errors import InputError
from mulki.models import VisionLanguageModel
from tests.engine.distributed_runs import ANCHORED, ON_REFERENCE, compare

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


def test_every_block_of_a_tower_is_a_unit(load_tiny: Callable[..., VisionLanguageModel]) -> None:
    model = load_tiny()
    found = [block for tower in model.towers() for block in sharding._blocks(tower)]
    assert found == [*model.clip.visual.transformer.resblocks, *model.clip.transformer.resblocks]


def test_a_block_without_parameters_is_no_unit() -> None:
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Identity()])
    tower = nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 2)})
    assert sharding._blocks(tower) == [layers[0]]


@pytest.mark.slow
def test_sharded_models_learn_as_whole_ones(base: dict[str, Any], tmp_path: Path) -> None:
    compare(base, SHARDED, 2, tmp_path, fsdp=True)


def test_sharding_needs_several_processes(base: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--fsdp: this is the only process"):
        run(resolve(base | {"fsdp": True, "name": "alone"}))
    assert not (Path(base["logs"]) / "alone").exists()
