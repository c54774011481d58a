"""A grid of runs, one for each method, order and seed.

The folder of a run says how far it is. So a grid that was stopped goes on when it is started again:
runs that are complete are kept, others go on from their last save.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from mulki import methods as methods_by_name
from mulki.choices.options import field_name
from mulki.console import Console
from mulki.distributed.launch import join, launched
from mulki.errors import InputError
from mulki.runs.environment import cores
from mulki.runs.new_folder import check_free, check_name, slug
from mulki.train.config.precision import device_of
from mulki.train.config.run_config import (
    Settings,
    import_given,
    options_for,
    read_config,
    resolve,
)
from mulki.train.config.tasks import limit_reading, load_tasks
from mulki.train.saving.checkpoints import ARGUMENTS
from mulki.train.saving.recovery import check_same_options, has_begun, is_complete
from mulki.train.saving.signals import Signals
from mulki.train.sequence import run
from mulki.train.start.data import check_unused, unused

State = Literal["complete", "stopped", "new"]

# What a command prints before the reason why it ends.
_ERROR = "mulki: error: "
# Longer orders are cut in the names of folders.
_LONGEST_ORDER = 40


@dataclass(frozen=True)
class Cell:
    """A run of a grid.

    Attributes:
        settings: with the name of its folder.
        state: of the folder.
    """

    settings: Settings
    state: State

    @property
    def folder(self) -> Path:
        return Path(self.settings.run.logs, self.settings.run.name or "")


def plan(
    given: Mapping[str, Any],
    *,
    methods: Sequence[str],
    orders: Sequence[str],
    seeds: Sequence[int],
) -> list[Cell]:
    """The runs of a grid, with what is there of each; nothing is written.

    Args:
        given: options of all runs, as `mulki.train.config.run_config.resolve` takes them. The
            folders are ``<logs>/<name>/<method>-order_<order>-seed_<seed>``, where the name is
            `grid` if none is given.
        methods, orders, seeds: of each a run is made with each of the others. An option, a
            reference set or a vocabulary is for the methods that have a use for it, if any has.

    Raises:
        InputError: bad options or tasks, or a folder of a run with other options.
    """
    cells: list[Cell] = []
    of_method = _for_each(given, methods)
    for method, order, seed in product(methods, orders, seeds):
        own = {**of_method[method], "order": order, "seed": seed}
        settings = resolve(own)
        check_name(settings.run.name)
        logs = Path(settings.run.logs, settings.run.name or "grid")
        if (logs / ARGUMENTS).exists():
            raise InputError(f"--name: {logs} is the folder of a run; give the grid another name")
        name = f"{slug(method)}-order_{_short(order)}-seed_{seed}"
        settings = resolve({**own, "logs": str(logs), "name": name})
        cells.append(Cell(settings, _state(logs / name, settings)))
    # Not after the runs of the first order.
    for config in {cell.settings.run.order: cell.settings.run for cell in cells}.values():
        limit_reading(config)
        load_tasks(config)
    return cells


def _for_each(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    # The options of each method's runs.
    import_given({field_name(key): value for key, value in given.items()})  # methods among others
    own = {name: options_for(given, [name], names) | {"method": name} for name in names}
    resolved = {name: resolve(options) for name, options in own.items()}
    made = {name: methods_by_name.get(name)(of.method) for name, of in resolved.items()}
    idle = {name: unused(of.run, made[name]).keys() for name, of in resolved.items()}
    if useless := set.intersection(*map(set, idle.values())):
        used_by_others = idle[names[0]] - useless
        kept = {k: v for k, v in own[names[0]].items() if k not in used_by_others}
        check_unused(resolve(kept).run, made[names[0]])
    return {
        name: {k: v for k, v in options.items() if k not in idle[name]}
        for name, options in own.items()
    }


def run_cells(cells: Sequence[Cell], jobs: int = 1, console: Console | None = None) -> None:
    """Do what is left of a grid.

    Args:
        cells: from `plan`.
        jobs: runs at a time. One runs in this process; several have processes of their own, which
            divide the CPU's cores and take the GPUs in turn, unless `device` names one.
        console: where progress is drawn.

    Raises:
        InputError: what `mulki.train.sequence.run` raises, or a run in a process of its own has
            failed. No other run is started then, and those under way end first.
        Stopped: a signal came; the runs have saved what they had.
    """
    left = [cell for cell in cells if cell.state != "complete"]
    console = console or Console(quiet=True)
    for cell in cells:
        words = {"complete": "is complete", "stopped": "goes on", "new": "is new"}[cell.state]
        _say(console, f"{cell.folder}: {words}")
    if jobs > 1 and launched():
        raise InputError("--jobs: got several beside torchrun, whose processes share one run")
    if jobs == 1 or len(left) < 2:
        if left:
            # Processes of torchrun meet once, for all runs.
            config = left[0].settings.run
            sharded = any(cell.settings.run.fsdp for cell in left)
            with join(device_of(config.device), config.process_timeout, sharded=sharded):
                for cell in left:
                    resume = cell.folder if cell.state == "stopped" else None
                    run(_settings(cell), console, resume=resume)
        return
    with tempfile.TemporaryDirectory() as configs, _children() as children, Signals():
        waiting = list(left)
        failure = None
        while waiting or children:
            while waiting and len(children) < jobs and failure is None:
                cell = waiting.pop(0)
                slot = min(set(range(jobs)) - set(children))
                environment = _environment(slot, jobs, _settings(cell).run.device)
                children[slot] = _Child(cell, Path(configs), environment)
                _say(console, f"{cell.folder}: started")
            slot = _first_ended(children)
            child = children.pop(slot)
            said = child.says()
            _say(console, f"{child.cell.folder}: {said or 'ended'}")
            failure = failure or (f"{child.cell.folder}: {said}" if said else None)
            if failure is not None:
                waiting.clear()
    if failure is not None:
        raise InputError(f"{failure}; mend it and give the same command, which goes on")


def _say(console: Console, words: str) -> None:
    console.print(words, highlight=False, markup=False, soft_wrap=True)


class _Child:
    # A run in a process of its own, in a session of its own, so that a signal from the terminal
    # reaches it once and through us.
    def __init__(self, cell: Cell, configs: Path, environment: Mapping[str, str]):
        self.cell = cell
        name = cell.folder.name
        if cell.state == "stopped":
            words = ["--resume", str(cell.folder)]
        else:
            config = configs / f"{name}.yaml"
            config.write_text(yaml.safe_dump(cell.settings.to_dict()), encoding="utf-8")
            words = ["--config", str(config)]
        self._errors = (configs / f"{name}.err").open("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mulki", "run", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def says(self) -> str:
        # Why it failed; nothing if it has not.
        code = self.process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        self._errors.close()
        if code == 0:
            return ""
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"was killed by {_signal_name(-code)}{hint}"
        said = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        return said[-1] if said else ", ".join([*lines[-1:], f"exit status {code}"])


@contextmanager
def _children() -> Iterator[dict[int, _Child]]:
    # The processes by slot; those that still run at the end are asked to save and to end.
    children: dict[int, _Child] = {}
    try:
        yield children
    finally:
        for child in children.values():
            child.process.terminate()
        for child in children.values():
            child.process.wait()


def _first_ended(children: Mapping[int, _Child]) -> int:
    # The slot of a process that has ended, waiting for it.
    while True:
        for slot, child in children.items():
            try:
                child.process.wait(timeout=1 / (10 * len(children)))
                return slot
            except subprocess.TimeoutExpired:
                continue


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _environment(slot: int, jobs: int, device: str) -> dict[str, str]:
    found = {}
    if "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, cores() // jobs))
    gpus = torch.cuda.device_count()
    # A device with a number is one of all that there are.
    if gpus > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ and ":" not in device:
        found["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    return found


def _short(order: str) -> str:
    # Of a long list of tasks, or one with other letters, the beginning, and what tells it from
    # others with the same one.
    plain = order if order.isascii() and order.isalnum() else slug(order)
    whole = all(letter.isascii() and (letter.isalnum() or letter in "_,") for letter in order)
    if whole and len(plain) <= _LONGEST_ORDER:
        return plain
    return f"{plain[: _LONGEST_ORDER - 9]}_{hashlib.sha256(order.encode()).hexdigest()[:8]}"


def _settings(cell: Cell) -> Settings:
    # A run goes on with the options that it began with.
    if cell.state == "stopped":
        return resolve(read_config(cell.folder / ARGUMENTS))
    return cell.settings


def _state(folder: Path, settings: Settings) -> State:
    if not has_begun(folder):
        check_free(folder.parent, folder.name)
        return "new"
    check_same_options(folder, settings)
    return "complete" if is_complete(folder) else "stopped"
