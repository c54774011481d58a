"""Saves of a run that is not finished: when they are made, their file, and who goes on from it.

A save holds everything that the rest of the run depends on and that the run has changed. What is
made from the configuration alone (tasks, the start model, the order of images) is made again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mulki.clip.tensor_files import checksum_of, load_tensors, not_finite, save_tensors
from mulki.distributed.parts import gathered
from mulki.distributed.world import ALONE, World
from mulki.errors import InputError, Stopped
from mulki.files import sync
from mulki.runs.new_folder import RECOVERY
from mulki.train.saving.signals import Signals

State = dict[str, Any]
FILE = "state.safetensors"
STUDENT = "student"
TOO_FAST = "lower --lr, or pass --grad-clip-norm"

_log = logging.getLogger(__name__)

# Of what a save holds: another number after each change of that, wherever its states are made.
_FORMAT = "1"
# A save costs at most this part of the time, by default.
_SHARE = 0.02
# What a first save is taken to cost, before one was measured: bytes written in a second.
_SPEED = 2e8


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
        self._signals = signals or Signals()
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
        with self._signals.held():
            started = time.monotonic()
            state = gathered(self._state(in_task), kept=self._path is not None)
            if self._path is not None:
                check_finite(state.get(STUDENT, {}), "the student", TOO_FAST)
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
            with self._signals.held():
                # A signal before this line ends the block between two steps.
                whole = False
                yield
                stop, due = self._agree(number)
                whole = not due
                if due:
                    self.save(state())
                    whole = True
            if stop:
                self._signals.raise_pending()
                raise Stopped(signal.SIGINT)  # another process got the signal

        # Several processes end at the same step, so none is left waiting for the others.
        waiting = self._signals.held() if self._world.size > 1 else contextlib.nullcontext()
        try:
            with waiting:
                yield step
        except BaseException as error:
            if whole and self._world.size == 1:
                # The error that ends the run counts, not one more.
                with contextlib.suppress(OSError, InputError):
                    self.save(state())
            raise error

    def _agree(self, number: int) -> tuple[bool, bool]:
        # Whether the run stops after this step, and whether it is saved.
        stop, due = self._signals.pending is not None, self._due(number)
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
    bad = not_finite(parts)
    if bad:
        raise InputError(
            f"{what}: {len(bad)} of {len(weights)} weights hold a NaN or an infinity, the first is "
            f"{bad[0]}; {advice}"
        )


def write_state(path: Path, state: State) -> None:
    """Write a state of nested dicts and lists, with tensors, numbers and texts in them."""
    tensors: dict[str, Tensor] = {}
    layout = json.dumps(_without_tensors(state, tensors, set()))
    save_tensors(path, tensors, {"layout": layout, "format": _FORMAT})


def read_state(folder: Path) -> State | None:
    """The last save of a run folder; None if there is none.

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
    try:
        state: State = _with_tensors(json.loads(metadata["layout"]), tensors)
        return state
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a save of this version ({error}); run again") from None


def hash_of_save(folder: Path) -> str:
    """What tells the last save of a run folder from others; "none" if there is none."""
    path = folder / RECOVERY / FILE
    return str(checksum_of(path)) if path.exists() else "none"


def _without_tensors(value: Any, tensors: dict[str, Tensor], known: set[int]) -> Any:
    # A tensor becomes {"tensor": its name}, a dict {"dict": ...}.
    if isinstance(value, Tensor):
        name = str(len(tensors))
        plain = value.detach().cpu().contiguous()
        # A file holds no two tensors that share memory.
        shared = plain.untyped_storage().data_ptr() in known
        tensors[name] = plain.clone() if shared else plain
        known.add(plain.untyped_storage().data_ptr())
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {k: _without_tensors(v, tensors, known) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(each, tensors, known) for each in value]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(each, tensors) for each in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _with_tensors(v, tensors) for k, v in value["dict"].items()}
    return value
