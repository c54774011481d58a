"""Going on with a run: its folder and last save are checked, and its state is set."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mulki import methods
from mulki.choices.options import flag, option_name
from mulki.clip.models import VisionLanguageModel
from mulki.clip.texts import TextInputs
from mulki.distributed.parts import set_whole
from mulki.distributed.world import World
from mulki.errors import InputError
from mulki.methods import PREVIOUS, Method
from mulki.report.comparison.groups import NEUTRAL
from mulki.runs.answers import FOLDER as ANSWERS
from mulki.runs.folder import RunFolder
from mulki.runs.lock import FolderLock
from mulki.runs.metrics import ZERO_SHOT
from mulki.runs.new_folder import RECOVERY
from mulki.runs.reading import read_json
from mulki.runs.results import read_evaluations
from mulki.train.config.precision import Precision
from mulki.train.config.run_config import RunConfig, Settings, read_config
from mulki.train.saving.checkpoints import ARGUMENTS
from mulki.train.saving.randomness import random_state, set_random_state
from mulki.train.saving.recovery import STUDENT, State, read_state

Frozen = Mapping[str, VisionLanguageModel]


class Running(Protocol):
    """What a save is made of: the part of a `Setup` that changes while the run goes on."""

    @property
    def model(self) -> VisionLanguageModel: ...

    @property
    def method(self) -> Method: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def world(self) -> World: ...


# Options in which a run may differ from what is asked for now.
_FREE = NEUTRAL - {"seed", "tasks", "order"}


def open_to_resume(path: Path, config: RunConfig) -> RunFolder:
    """Open and lock the folder of a run that is to go on.

    Raises:
        InputError: it cannot go on, or another process has the folder.
    """
    lock = FolderLock(path)
    try:
        folder = RunFolder.open(path, lock)
        saved = read_state(path)
        learned = 0 if saved is None else saved["learned"]
        # The row of weights that were saved at a task's end may be missing. A method that does not
        # train has no save, and any of its rows may be missing.
        fewest = learned if saved is None or saved["in_task"] is None else learned + 1
        if methods.get(config.method).trains and not fewest <= folder.rows <= learned + 1:
            found = "no save" if saved is None else f"a save after {learned} tasks"
            raise InputError(
                f"--resume: {path} has {folder.rows} rows of results and {found}; start another run"
            )
        _check_lines(folder)
        return folder
    except BaseException:
        lock.release()
        raise


def _check_lines(folder: RunFolder) -> None:
    # Lines are on disk before the row that they make, but a copy may have been made in between.
    names = [*([] if folder.matrix.zero_shot is None else [ZERO_SHOT]), *folder.matrix.tasks]
    results = folder.path / "results.jsonl"
    found = {line.after_task for line in read_evaluations(results)} if results.exists() else set()
    for name in names:
        if name not in found:
            raise InputError(
                f"--resume: {results} has no line of the row {name} of matrix.csv, as in a copy "
                "that was made while the run went on; copy the folder again"
            )


def has_begun(folder: Path) -> bool:
    """Whether the run of a folder has got as far as results or a save."""
    rows = any(
        (folder / name).exists() for name in (RECOVERY, "matrix.csv", "results.jsonl", ANSWERS)
    )
    return rows and (folder / ARGUMENTS).is_file()


def check_same_options(folder: Path, settings: Settings) -> None:
    """Check that a run folder is of a run with these settings, but for what changes no result.

    Raises:
        InputError: an option differs.
    """
    known = {option_name(k): v for k, v in read_config(folder / ARGUMENTS).items()}
    wanted = settings.to_dict()
    if wanted["precision"] == "auto":
        # The run folder has what it came to.
        wanted["precision"] = known.get("precision")
    for name in sorted({*known, *wanted} - _FREE):
        if known.get(name) != wanted.get(name):
            raise InputError(
                f"{flag(name)}: {folder} is of a run with {known.get(name)}, this one has "
                f"{wanted.get(name)}; give another --name, or remove the folder"
            )


def is_complete(path: Path) -> bool:
    """Whether a run has learned its last task."""
    try:
        return read_json(path / "summary.json").get("status") == "complete"
    except (OSError, InputError):
        return False


def finish_again(path: Path) -> RunFolder:
    """Remove what a run that is complete may have left, if it was killed just then."""
    folder = RunFolder.open(path, FolderLock(path))
    folder.finish()
    folder.release()
    return folder


def read_save(folder: Path, world: World) -> State | None:
    """The last save of a run; None if there is none, so that it starts again.

    Raises:
        InputError: no such folder here, a damaged save, or a run on another number of processes.
    """
    if not (folder / ARGUMENTS).is_file():
        raise InputError(
            f"--resume: {folder} is not to be seen on {platform.node()}, but every process reads "
            "the save; put the run folder where all machines see it"
        )
    saved = read_state(folder)
    # A run without a save starts again, but its batches were those of as many processes too.
    known = read_json(folder / "env.json").get("processes", 1)
    processes = known if saved is None else saved["processes"]
    if processes != world.size:
        raise InputError(
            f"--resume: {folder} is of a run on {processes} processes, these are {world.size}; "
            "start as many"
        )
    return saved


def check_same(folder: Path, hashes: Mapping[str, Any]) -> None:
    """Check that tasks and start weights are those that the run began with.

    Raises:
        InputError: they are not.
    """
    name = changed(folder, hashes)
    if name is not None:
        raise InputError(
            f"--resume: the {name} are not those that {folder} began with; restore them, or "
            "start another run"
        )


def changed(folder: Path, hashes: Mapping[str, Any]) -> str | None:
    """The first of these hashes that ``env.json`` of a run has not.

    Raises:
        InputError: the file is not JSON.
    """
    known = read_json(folder / "env.json").get("hashes")
    known = known if isinstance(known, dict) else {}
    return next((name for name, value in hashes.items() if known.get(name) != value), None)


def run_state(
    setup: Running,
    frozen: Frozen,
    texts: TextInputs,
    learned: int,
    steps: int,
    in_task: State | None,
) -> State:
    """What a save holds. All processes have to call this.

    Args:
        frozen: the teachers.
        texts: of the student.
        learned: number of tasks that were learned.
        steps: optimiser steps of these.
        in_task: the state within the task that comes next, None between two tasks.
    """
    model = setup.model
    if in_task is not None:
        previous = frozen.get(PREVIOUS)
        weights = None if previous is None else _weights(model, previous)
        in_task = in_task | {"previous": weights}
    random = random_state(model.device).to(model.device).unsqueeze(0)
    return {
        "processes": setup.world.size,
        "learned": learned,
        "steps": steps,
        STUDENT: _weights(model, model),
        "method": setup.method.state_dict(),
        "texts": texts.state(),
        "scaler": setup.precision.scaler.state_dict(),
        "random": setup.world.gather(random, setup.world.size),
        "in_task": in_task,
    }


def restore(saved: State, setup: Running, frozen: Frozen, texts: TextInputs) -> State | None:
    """Set what `run_state` returned, into a run that is at its start.

    Returns:
        The state within a task, with that of the random generators; None between two tasks.
    """
    model = setup.model
    _set_weights(model, model, saved[STUDENT])
    setup.method.load_state_dict(saved["method"], strict=False)
    texts.restore(saved["texts"])
    setup.precision.scaler.load_state_dict(saved["scaler"])
    random = saved["random"][setup.world.rank]
    set_random_state(random, model.device)
    in_task: State | None = saved["in_task"]
    if in_task is None:
        return None
    if in_task["previous"] is not None:
        _set_weights(model, frozen[PREVIOUS], in_task["previous"])
    return in_task | {"random": random}


def _weights(student: VisionLanguageModel, model: VisionLanguageModel) -> dict[str, Tensor]:
    # Of a model, those that train in the student; the others are the start model's.
    found = model.clip.state_dict()
    return {name: found[name] for name in student.trainable()}


def _set_weights(
    student: VisionLanguageModel, model: VisionLanguageModel, weights: Mapping[str, Tensor]
) -> None:
    for name, value in _weights(student, model).items():
        set_whole(value, weights[name])
