"""Going on by itself with a run whose processes torchrun has started again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mulki.distributed import launch
from mulki.distributed.launch import launcher
from mulki.distributed.meeting import Meeting
from mulki.errors import InputError
from mulki.runs.reading import read_json
from mulki.train.config.run_config import Settings, read_config
from mulki.train.saving.checkpoints import ARGUMENTS
from mulki.train.saving.recovery import check_same_options, has_begun


def restart_of(settings: Settings) -> tuple[Settings, Path] | None:
    """What to go on with where torchrun has started the processes of a run again.

    The first process looks for the folder, and tells the others; each takes it from where its own
    options say. A folder that none of these torchruns has begun is not taken.

    Returns:
        The settings, with the precision that the run began with, and the folder; None for a run
        from its start.

    Raises:
        InputError: a run that torchrun may start again has no name, by which to find its folder;
            or, in all processes, the folder is that of a run with other options.
    """
    config = settings.run
    met = launch.meeting() if launch.launched() else None
    if not _may_restart(met):
        return None
    if config.name is None:
        raise InputError(
            "--name: got none beside --max-restarts of torchrun, but a run that is started "
            "again is found by its name; pass one"
        )
    folder = Path(config.logs, config.name)
    precision: Any
    if met is None:
        begun = launch.restarts_here() > 0
        precision = _precision_of(folder, settings, [launcher()]) if begun else None
    else:
        precision = _told_by_the_first(met, folder, settings)
    if precision is None:
        return None
    return replace(settings, run=replace(config, precision=precision)), folder


def _may_restart(met: Meeting | None) -> bool:
    # Whether torchrun starts processes again that have failed, on all machines or on none.
    if met is None:
        return launch.most_restarts() != "0"
    allowed = sorted({most for _, most, _ in map(json.loads, met.words)})
    if len(allowed) > 1:
        raise InputError(
            f"--max-restarts: torchrun has {' and '.join(allowed)} on the machines of this run; "
            "pass the same number to all"
        )
    return bool(allowed != ["0"])


def _told_by_the_first(met: Meeting, folder: Path, settings: Settings) -> str | None:
    # One torchrun may have seen no failure, but another machine's.
    restarts, _, launchers = zip(*map(json.loads, met.words), strict=True)
    if not any(restarts):
        return None
    found: dict[str, str | None] = {}
    if met.rank == 0:
        try:
            found["precision"] = _precision_of(folder, settings, launchers)
        except (OSError, InputError) as error:
            found["problem"] = str(error)
    told: dict[str, str | None] = met.told_by_first("restart", found)
    if "problem" in told:
        raise InputError(str(told["problem"]))
    return told["precision"]


def _precision_of(folder: Path, settings: Settings, launchers: Sequence[str | None]) -> str | None:
    # That of the run which one of these torchruns has begun; None if there is no such run.
    if not has_begun(folder) or read_json(folder / "env.json").get("started_by") not in launchers:
        return None
    check_same_options(folder, settings)
    return str(read_config(folder / ARGUMENTS)["precision"])
