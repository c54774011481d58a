"""Where a run's curves go besides its folder: TensorBoard and Weights & Biases.

Both packages are optional (`pip install mulki[track]`). Weights & Biases keeps its files in the run
folder and sends nothing, unless ``WANDB_MODE`` says otherwise; `wandb sync` sends them later.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mulki.errors import InputError, nearest

_log = logging.getLogger(__name__)

AUTO = "auto"
NONE = "none"


class TensorBoard:
    """``tensorboard/`` in the run folder."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, object]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def add(self, scalars: Mapping[str, float], step: int, axis: str) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """``wandb/`` in the run folder; offline unless ``WANDB_MODE`` says otherwise."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, object]):
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode != "online":
            # What it reports of itself would be sent in any mode.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mulki"),
            name=name,
            dir=str(folder),
            config=dict(config),
            mode=mode,
            # Its files are for the run alone, and its own lines would tear the display apart.
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Not its own counter of calls as an axis: that starts anew where a run goes on.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("metrics/*", step_metric="tasks")

    def add(self, scalars: Mapping[str, float], step: int, axis: str) -> None:
        self._run.log({**scalars, axis: step})

    def close(self) -> None:
        self._run.finish()


# By the name of the package.
_KINDS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Tracker:
    """One place that scalars go to, logged and left out from its first error on."""

    def __init__(self, kind: str, tracker: TensorBoard | WandB):
        self._kind = kind
        self._tracker: TensorBoard | WandB | None = tracker

    def add(self, scalars: Mapping[str, float], step: int, axis: str) -> None:
        """Add points by name; `step` counts along `axis`, such as "step" or "tasks"."""
        self._try(lambda tracker: tracker.add(scalars, step, axis))

    def close(self) -> None:
        """Write what is left."""
        self._try(lambda tracker: tracker.close())

    def _try(self, call: Callable[[TensorBoard | WandB], None]) -> None:
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:  # each package has errors of its own
            self._tracker = None
            _log.warning("no more curves for %s (%s: %s)", self._kind, type(error).__name__, error)


def chosen(report_to: Sequence[str], *, installed: bool = True) -> tuple[str, ...]:
    """The trackers that an option names, as words or with commas between.

    Args:
        report_to: `auto` (TensorBoard where it is installed), `none`, `all`, or names.
        installed: refuse a package that is not.

    Raises:
        InputError: an unknown name, or a package that is not installed.
    """
    names = [name for word in report_to for name in word.split(",") if name]
    known = (*_KINDS, "all", AUTO, NONE)
    for name in names:
        if name not in known:
            raise InputError(
                f"--report-to: got {name!r}{nearest(name, known)}, wanted {', '.join(known)}"
            )
    if NONE in names and len(names) > 1:
        raise InputError(f"--report-to: got none beside {' '.join(names)}; leave one out")
    wanted = [name for name in _KINDS if name in names or "all" in names]
    for name in wanted:
        if installed and not _installed(name):
            raise InputError(
                f"--report-to: the package {name} is not installed; pip install {name}, or leave "
                "it out"
            )
    if AUTO in names and "tensorboard" not in wanted and _installed("tensorboard"):
        wanted.append("tensorboard")
    return tuple(wanted)


def open_trackers(
    report_to: Sequence[str], folder: Path, name: str, config: Mapping[str, object]
) -> list[Tracker]:
    """Open what `chosen` names for a run; one that fails, now or later, is logged and left out."""
    found: list[Tracker] = []
    for kind in chosen(report_to, installed=False):
        try:
            found.append(Tracker(kind, _KINDS[kind](folder, name, config)))
        except Exception as error:  # each package has errors of its own
            _log.warning("no curves for %s (%s: %s)", kind, type(error).__name__, error)
    return found


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
