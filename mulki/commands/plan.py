"""``mulki plan``: what a run would do and cost, without making it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from textwrap import TextWrapper
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mulki.commands.grid import is_grid
from mulki.engine.config import Settings, resolve
from mulki.engine.costs import Costs, measure
from mulki.engine.downloads import weights_to_download
from mulki.engine.plan import millions, plan
from mulki.engine.progress import megabytes
from mulki.engine.setup import Setup, prepared
from mulki.engine.time_left import clock
from mulki.errors import InputError, counted
from mulki.offline import offline

# Bytes of a parameter in most published weights.
_FLOAT32 = 4
# Below the first word of a line.
_INDENT = " " * 9
_COLUMNS = "before: until its first step; learn: the whole task; test all: after it"


def show_plan(given: Mapping[str, Any], console: Console, *, as_json: bool) -> None:
    """Print what a run with these options would do, what it takes, and what it would download.

    Args:
        given: options of a run, text as the command line has them.
        console: where the progress of the measurement is shown.
        as_json: print one JSON object instead of a table.

    Raises:
        InputError: what `mulki run` would refuse, or options of a grid.
    """
    if is_grid(given):
        raise InputError(
            "mulki plan: got --seeds, --orders, --methods or --jobs, but looks at one run; its "
            "seconds are those of each of them"
        )
    settings = resolve(given)
    source = weights_to_download(settings.run.model, settings.run.pretrained)
    with offline(), _prepared(settings, source) as setup:
        lines = plan(setup)
        if not setup.world.main:
            console = Console(quiet=True)
        costs = measure(setup, lambda words: console.print(words, markup=False, highlight=False))
        main = setup.world.main
    if not main:
        return
    size = _FLOAT32 * costs.parameters
    if as_json:
        found = [{"from": source, "bytes": size, "estimated": True}] if source else []
        about = {"method": settings.run.method, "model": settings.run.model}
        print(json.dumps({**about, **costs.to_dict(), "downloads": found}))
        return
    if source:
        lines.append(f"download {source}, about {megabytes(size)} (its parameters in float32)")
        lines.append("         random weights stand in for it here, which cost the same")
    lines += _lines(costs, settings)
    out = Console()
    wrapper = TextWrapper(
        out.width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
    )
    wrapped = "\n".join(map(wrapper.fill, lines))
    out.print(wrapped, soft_wrap=True, markup=False, highlight=False)
    out.print(_table(costs))
    out.print(_COLUMNS, style="dim", highlight=False)


@contextmanager
def _prepared(settings: Settings, source: str) -> Iterator[Setup]:
    if source:
        settings = replace(settings, run=replace(settings.run, pretrained=None))
    with ExitStack() as stack:
        try:
            setup = stack.enter_context(prepared(settings, write=False))
        except InputError as error:
            if not source:
                raise
            raise InputError(
                f"{error} (for a plan nothing is downloaded, and of this model more than the "
                f"weights may be missing here)"
            ) from None
        yield setup


def _lines(costs: Costs, settings: Settings) -> list[str]:
    stored = f"{millions(costs.stored)} parameters, {megabytes(costs.stored_bytes)} a task"
    needs = [f"{megabytes(costs.models)} models"]
    if costs.training:
        needs.append(f"{megabytes(costs.training)} gradients and optimiser")
    if costs.teacher_features:
        needs.append(f"{megabytes(costs.teacher_features)} features of teachers")
    if costs.image is not None:
        needs.append(f"{costs.image / 2**20:.1f} MiB an image")
    if costs.peak is not None:
        needs.append(f"{megabytes(costs.peak)} at most while this was measured")
    lines = [
        f"stored   {stored if costs.stored else 'no checkpoints'}",
        f"needs    {', '.join(needs)}",
    ]
    if costs.image is not None:
        lines.append(f"fits     {_fits(costs, settings.run.micro_batch)}")
    lines.append(f"time     {clock(costs.seconds)} for the whole run, h:mm:ss")
    return lines


def _fits(costs: Costs, micro_batch: str | None) -> str:
    if costs.largest is None:
        return "an unknown number of images at a time"
    said = f"{counted(costs.largest, 'image')} at a time in half of the free memory"
    if costs.largest >= costs.batch or micro_batch is not None:
        return f"{said}; a step has {costs.batch}"
    return f"{said}, but a step has {costs.batch}: pass --micro-batch auto"


def _table(costs: Costs) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task")
    for name in ("classes", "train", "test", "steps", "before", "step", "learn", "test all"):
        table.add_column(name, justify="right", no_wrap=True)
    tested = sum(each.testing_again for each in costs.tasks)
    for each in costs.tasks:
        step = "-" if each.later_step is None else f"{each.later_step:.3g} s"
        table.add_row(
            each.name,
            *map(str, (each.classes, each.train, each.test, each.steps)),
            clock(each.prepare),
            step,
            clock(each.learning),
            clock(tested),
        )
    return table
