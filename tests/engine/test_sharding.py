"""Models sharded over processes: what is sharded, and that they learn as whole ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from mulki.engine import sequence, sharding
from mulki.engine.config import read_config, resolve
from mulki.engine.resuming import folder_of_restart
from mulki.errors import InputError
from mulki.models import VisionLanguageModel
from tests.engine.distributed_runs import ANCHORED, ON_REFERENCE, compare
from tests.engine.run_helpers import Run
from tests.engine.test_resuming import stop_at

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
    # AdamW makes rounding errors larger, by lr / eps.
    "fsdp-reference": (ON_REFERENCE | {"augment": "crop", "eps": 1e-2}, 6),
    "fsdp-micro-reference": (ON_REFERENCE | {"micro_batch": "2", "eps": 1e-2}, 6),
    # Captions that no model, or the teacher alone, encodes.
    "fsdp-snd": ({"method": "snd", "reference": "current", "eps": 1e-2}, 6),
    "fsdp-zscl": ({"method": "zscl", "reference": "current", "we_every": "2", "eps": 1e-2}, 6),
    "fsdp-wise": ({"method": "wise_ft", "wise_base": "zero_shot"}, 6),
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
    log = (Path(base["logs"]) / "fsdp-2" / "out.log").read_text()
    assert "no saves are made: a run that is stopped cannot go on" in log


def test_sharding_needs_several_processes(base: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--fsdp: this is the only process"):
        sequence.run(resolve(base | {"fsdp": True, "name": "alone"}))
    assert not (Path(base["logs"]) / "alone").exists()


def test_a_sharded_run_makes_no_saves_and_is_refused_where_it_would_need_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 3, RuntimeError("stop"))
        run("stopped", method="finetune")
    arguments = tmp_path / "logs" / "stopped" / "args.yaml"
    arguments.write_text(yaml.safe_dump(yaml.safe_load(arguments.read_text()) | {"fsdp": True}))
    settings = resolve(read_config(arguments))
    before = arguments.with_name("out.log").read_text()
    with pytest.raises(InputError, match="--resume: .*with --fsdp, which makes no saves"):
        sequence.run(settings, resume=arguments.parent)
    assert arguments.with_name("out.log").read_text() == before
    with pytest.raises(InputError, match="--save-every: got 2 beside --fsdp"):
        sequence.run(replace(settings, run=replace(settings.run, name="new", save_every=2)))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="--max-restarts: a run with --fsdp makes no saves"):
        folder_of_restart(settings)
