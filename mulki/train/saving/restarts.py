"""Going on by itself with a run whose processes torchrun has started again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mulki.distributed import launch
from mulki.errors import InputError
from mulki.runs.reading import read_json
from mulki.train.config.run_config import Settings, read_config
from mulki.train.saving.checkpoints import ARGUMENTS
from mulki.train.saving.recovery import check_same_options, has_begun


def restart_of(settings: Settings) -> tuple[Settings, Path] | None:
    """What to go on with where torchrun has started the processes of a run again.

    That is so where one of these torchruns has begun the folder of that name. The first process
    looks for it, and tells the others; each takes it from where its own options say.

    Returns:
        The settings, with the precision that the run began with, and the folder; None for a run
        from its start.

    Raises:
        InputError: a run that torchrun may start again has no name, by which to find its folder;
            or, in all processes, the folder is that of a run with other options.
    """
    config, met = settings.run, launch.met()
    most, launchers, _ = zip(*met.words, strict=True)
    if set(most) == {"0"}:
        return None
    if config.name is None:
        raise InputError(
            "--name: got none beside --max-restarts of torchrun, but a run that is started "
            "again is found by its name; pass one"
        )
    folder = Path(config.logs, config.name)
    found = _found(folder, settings, launchers) if met.rank == 0 else {}
    told = met.told_by_first("restart", found)
    if "problem" in told:
        raise InputError(told["problem"])
    if told["precision"] is None:
        return None
    return replace(settings, run=replace(config, precision=told["precision"])), folder


def _found(folder: Path, settings: Settings, launchers: Sequence[str]) -> dict[str, str | None]:
    # The precision of the run that one of these torchruns has begun, None if there is none.
    try:
        began = has_begun(folder) and read_json(folder / "env.json").get("started_by") in launchers
        if not began:
            return {"precision": None}
        check_same_options(folder, settings)
        return {"precision": str(read_config(folder / ARGUMENTS)["precision"])}
    except (OSError, InputError) as error:
        return {"problem": str(error)}
