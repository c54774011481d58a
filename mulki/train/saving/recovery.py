"""Saves of a run that is not finished: when they are made, their files, and how a run goes on.

A save is one dict with everything that the rest of the run depends on and that the run has changed.
What is made from the configuration alone (tasks, the start model, the order of images) is made
again. Its file holds tensors, and the rest as JSON.
"""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mulki import methods
from mulki.choices.options import flag, option_name
from mulki.clip.tensor_files import CHECKSUM, load_tensors, save_tensors
from mulki.distributed.parts import whole
from mulki.distributed.world import ALONE, World
from mulki.errors import InputError, Stopped
from mulki.files import sync
from mulki.methods import Method
from mulki.report.comparison.groups import NEUTRAL
from mulki.runs.answers import FOLDER as ANSWERS
from mulki.runs.folder import RunFolder
from mulki.runs.lock import FolderLock
from mulki.runs.new_folder import RECOVERY
from mulki.runs.reading import read_json
from mulki.runs.results import read_evaluations
from mulki.train.config.run_config import RunConfig, Settings, read_config
from mulki.train.saving.checkpoints import ARGUMENTS
from mulki.train.saving.signals import Signals

State = dict[str, Any]

FILE = "state.safetensors"
STUDENT = "student"
TOO_FAST = "lower --lr, or pass --grad-clip-norm"

# Of what a save holds: another number after each change of that, wherever its states are made.
_FORMAT = "7"
# In JSON, a tensor is {_TENSOR: its name}.
_TENSOR = "__tensor__"
# A save costs at most this part of the time, by default.
_SHARE = 0.02
# What a first save is taken to cost, before one was measured: bytes written in a second.
_SPEED = 2e8
# Options in which a run may differ from what is asked for now.
_FREE = NEUTRAL - {"seed", "tasks", "order", "continue", "test_tasks"}


class Saves:
    """Makes the saves of a run.

    Args:
        folder: of the run; None where nothing is saved, as in all processes but the first.
        signals: which end the run between two steps, after a save.
        world: the processes that learn together; they agree on when to save.
        device: of this process.
        every: steps between two saves within a task, 0: none; None: as often as they cost 2 % of
            the time.
        size: bytes of a save, roughly.
        used: whether there are saves at all.

    Attributes:
        signals: as above.
    """

    def __init__(
        self,
        folder: Path | None,
        signals: Signals | None = None,
        world: World = ALONE,
        device: torch.device | None = None,
        every: int | None = None,
        size: int = 0,
        used: bool = True,
    ):
        self._path = None if folder is None else folder / RECOVERY / FILE
        self.signals = signals or Signals()
        self._world = world
        self._device = device or torch.device("cpu")
        self._every = every
        self._used = used
        self._seconds = size / _SPEED
        self._saved_at = time.monotonic()
        self._state: Callable[[State | None], State] = lambda in_task: {}

    def of_run(self, state: Callable[[State | None], State]) -> None:
        """Set what a save holds, given the state within a task, or None between two tasks."""
        self._state = state

    def save(self, in_task: State | None = None) -> None:
        """Make a save. All processes have to call this.

        Raises:
            InputError: the student's weights are not finite; the older save stays.
            OSError: it cannot be written; the older save stays.
        """
        if not self._used:
            return
        with self.signals.held():
            started = time.monotonic()
            state = self._state(in_task)
            check_finite(state.get(STUDENT, {}), "the student", TOO_FAST)
            if self._path is not None:
                self._path.parent.mkdir(exist_ok=True)
                sync(self._path.parent.parent)
            write_state(self._path, state)
            self._saved_at = time.monotonic()
            self._seconds = self._saved_at - started

    @contextlib.contextmanager
    def within_task(self, state: Callable[[], State]) -> Iterator[Callable[[int], Any]]:
        """Yield a context manager for each step of a task, by number, which saves after some.

        Signals wait for the end of a step. What ends the block between two steps is raised after
        one more save.

        Args:
            state: within the task, after the last step.
        """
        whole = True

        @contextlib.contextmanager
        def step(number: int) -> Iterator[None]:
            nonlocal whole
            with self.signals.held():
                # A signal before this line ends the block between two steps.
                whole = False
                yield
                stop, due = self._agree(number)
                whole = not due
                if due:
                    self.save(state())
                    whole = True
            if stop:
                self.signals.raise_pending()
                raise Stopped(signal.SIGINT)  # another process got the signal

        # Several processes end at the same step, so none is left waiting for the others.
        waiting = self.signals.held() if self._world.size > 1 else contextlib.nullcontext()
        try:
            with waiting:
                yield step
        except BaseException as error:
            if whole and self._world.size == 1:
                self._save_once_more(state)
            raise error

    @contextlib.contextmanager
    def after_task(self) -> Iterator[None]:
        """What ends the block, in which no weight changes, is raised after one more save.

        With several processes signals wait, and an error makes no save.
        """
        if self._world.size > 1:
            with self.signals.held():
                yield
            return
        try:
            self.signals.raise_pending()
            yield
        except BaseException as error:
            self._save_once_more(lambda: None)
            raise error

    def _save_once_more(self, state: Callable[[], State | None]) -> None:
        # The error that ends the run counts, not one more, such as no memory again.
        with contextlib.suppress(Exception):
            self.save(state())

    def _agree(self, number: int) -> tuple[bool, bool]:
        # Whether the run stops after this step, and whether it is saved.
        stop, due = self.signals.pending is not None, self._due(number)
        if self._world.size > 1:
            due = due and self._world.main
            totals = self._world.total(int(stop), int(due), device=self._device)
            stop, due = totals[0] > 0, totals[1] > 0
        return stop, due or (stop and self._world.size > 1)

    def _due(self, number: int) -> bool:
        if self._every is not None:
            return self._every > 0 and number % self._every == 0
        return time.monotonic() - self._saved_at >= self._seconds * (1 / _SHARE - 1)


def check_finite(weights: Mapping[str, Tensor], what: str, advice: str) -> None:
    """Raise an error that names the first of the weights that holds a NaN or an infinity.

    Raises:
        InputError: there is one.
    """
    parts = {n: v.to_local() if isinstance(v, DTensor) else v for n, v in weights.items()}
    bad = [n for n, v in parts.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise InputError(
            f"{what}: {len(bad)} of {len(weights)} weights hold a NaN or an infinity, the first is "
            f"{bad[0]}; {advice}"
        )


def write_state(path: Path | None, state: State) -> None:
    """Write a state of nested dicts and lists, with tensors, numbers and texts in them.

    Args:
        path: None in all processes but the one that writes. They take part since each may have a
            part of a tensor; one tensor at a time is whole on the device.
    """
    tensors: dict[str, Tensor] = {}

    def take_out(value: Any) -> dict[str, str]:
        if not isinstance(value, Tensor):
            raise TypeError(f"{type(value).__name__}: a save holds tensors, numbers and texts")
        value = whole(value)
        name = str(len(tensors))
        if path is not None:
            tensors[name] = value.detach().cpu()
        return {_TENSOR: name}

    _check_keys(state)
    layout = json.dumps(state, default=take_out)
    if path is not None:
        save_tensors(path, tensors, {"layout": layout, "format": _FORMAT})


def _check_keys(value: Any) -> None:
    # JSON would make texts of others.
    if isinstance(value, dict):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{bad[0]!r}: a save holds dicts whose keys are texts")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            _check_keys(each)


def read_state(folder: Path) -> State | None:
    """The last save of a run folder, with its checksum as `CHECKSUM`; None if there is none.

    Raises:
        InputError: it is damaged, or of another version of mulki.
    """
    path = folder / RECOVERY / FILE
    if not path.exists():
        return None
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _FORMAT:
        raise InputError(
            f"{path}: a save of another version of mulki; go on with that version, or start "
            "another run"
        )
    state: State = json.loads(
        metadata["layout"], object_hook=lambda d: tensors[d[_TENSOR]] if _TENSOR in d else d
    )
    return state | {CHECKSUM: metadata[CHECKSUM]}


def open_to_resume(path: Path, config: RunConfig) -> RunFolder:
    """Open and lock the folder of a run that is to go on.

    Raises:
        InputError: it cannot go on, or another process has the folder.
    """
    lock = FolderLock(path)
    try:
        folder = RunFolder.open(path, lock)
        saved = read_state(path)
        # The row of weights that were saved at a task's end may be missing. A method that does not
        # train has no save, and any of its rows may be missing; so may those of the models of a run
        # that this one goes on from.
        most = 1 if saved is None else saved["rows"]
        fewest = most - 1 if saved is None or saved["in_task"] is None else most
        free = not methods.get(config.method).trains
        free |= saved is None and config.continue_ is not None
        if not free and not fewest <= folder.rows <= most:
            found = "no save" if saved is None else f"a save after {saved['learned']} tasks"
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
    results = folder.path / "results.jsonl"
    found = {line.after_task for line in read_evaluations(results)} if results.exists() else set()
    for name, _ in folder.matrix.named_rows():
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


def changed(folder: Path, hashes: Mapping[str, Any], *, some: bool = False) -> str | None:
    """The first of these hashes that ``env.json`` of a run has not.

    Args:
        some: of hashes by task, those of some tasks are enough.

    Raises:
        InputError: the file is not JSON.
    """
    known = read_json(folder / "env.json").get("hashes")
    known = known if isinstance(known, dict) else {}
    if some:
        known = {
            name: {task: of for task, of in known.get(name, {}).items() if task in value}
            for name, value in hashes.items()
        }
    # Folders of before it was written have none of test images.
    compared = [name for name in hashes if name in known or name != "tests"]
    return next((name for name in compared if known.get(name) != hashes[name]), None)


def restore_method(method: Method, saved: Mapping[str, Any], *, strict: bool = False) -> None:
    """Set the state of a method, whose tensors may have had other sizes then.

    Args:
        strict: whether it has to have all of them, and no others.
    """
    # Where it is strict, an optimiser has the parameters already.
    parameters = [] if strict else list(method.named_parameters())
    for name, own in [*parameters, *method.named_buffers()]:
        if name in saved and saved[name].shape != own.shape:
            new = own.detach().new_empty(saved[name].shape)
            path, _, last = name.rpartition(".")
            value = nn.Parameter(new, own.requires_grad) if isinstance(own, nn.Parameter) else new
            setattr(method.get_submodule(path), last, value)
    method.load_state_dict(saved, strict=strict)
