"""``mulki plan``: what a run would do and cost, without making it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from textwrap import TextWrapper
from typing import Any

from rich.table import Table
from rich.text import Text

from mulki import methods
from mulki.app.commands.grid import is_grid
from mulki.clip.offline import offline
from mulki.console import Console
from mulki.data.published.collections import COLLECTIONS
from mulki.distributed import launch
from mulki.distributed.torchrun import is_first
from mulki.errors import InputError, counted
from mulki.report.tables import plain_table
from mulki.runs import trackers
from mulki.runs.new_folder import check_free
from mulki.train.card import Way, most, ways
from mulki.train.config.run_config import RunConfig, Settings, resolve
from mulki.train.costs import Costs, measure
from mulki.train.display.outline import in_lines, millions, of_tasks, plan, steps_of_tasks
from mulki.train.display.progress import megabytes
from mulki.train.display.time_left import clock
from mulki.train.start.data import load_data
from mulki.train.start.downloads import Download, StandIns, not_here
from mulki.train.start.setup import check_options, prepared

# Below the first word of a line.
_INDENT = " " * 9
_WAYS = (
    "held: student, teachers and their features, optimiser; batch: features of all images of a "
    "step; step: with one image at a time; more: each further one, at most; test: a batch of "
    "--batch-size-eval; images: as many at a time, a tenth of the card left free"
)
_COLUMNS = "before: until its first step; learn: the whole task; test all: after it"


class _Command(str):
    # A line to be copied into a shell: it is never broken.
    pass


def show_plan(
    given: Mapping[str, Any], console: Console, *, as_json: bool, card: float | None = None
) -> None:
    """Print what a run with these options would do, what it takes, and what it would download.

    Blank images and random weights stand in for data sets and models that are not on this machine.
    Of a model that only a hub knows, its tasks and their steps are all that can be planned.

    Args:
        given: options of a run, text as the command line has them.
        console: where the progress of the measurement is shown.
        as_json: print one JSON object instead of a table.
        card: gigabytes; count what a step needs on a card of that size in place of measuring.

    Raises:
        InputError: what `mulki run` would refuse beside what is not here, or options of a grid.
    """
    if is_grid(given):
        raise InputError(
            "mulki plan: got --seeds, --orders, --methods or --jobs, but looks at one run; its "
            "seconds are those of each of them"
        )
    settings = resolve(given)
    if card is not None and settings.run.precision == "auto":
        # That of a card, whatever this machine has.
        settings = resolve({**given, "precision": "amp_bf16"})
    config = settings.run
    stand_ins = StandIns()
    known = not_here(config.model, config.pretrained)[0] is not None
    if card is not None and (config.fsdp or not methods.get(config.method).trains or not known):
        why = f"method {config.method}, which takes no step"
        why = "a sharded model" if config.fsdp else why
        why = why if known else f"{config.model}, whose shapes are known once it was downloaded"
        raise InputError(f"--card-gb: got {card:g} for {why}; leave it out")
    if not known:
        _outline(settings, stand_ins, as_json)
        return
    with offline(), prepared(settings, write=False, stand_ins=stand_ins) as setup:
        lines = plan(setup)
        if not setup.world.main:
            console = Console(quiet=True)
        if card is not None:
            if setup.world.main:
                # A batch has no more images than a task.
                batch = min(config.batch_size, max(len(task.train) for task in setup.tasks))
                _show_ways([*ways(setup)], card, lines, config, batch, stand_ins, as_json=as_json)
            return
        costs = measure(setup, lambda words: console.print(words, markup=False, highlight=False))
        main = setup.world.main
    if not main:
        return
    if as_json:
        _print_json(config, costs.to_dict(), stand_ins.downloads)
        return
    lines += [*_of_downloads(stand_ins.downloads, config, measured=True), *_lines(costs, settings)]
    out = _print_lines(lines)
    out.print(_table(costs))
    out.print(_COLUMNS, style="dim", highlight=False)


def _show_ways(
    found: Sequence[Way],
    card: float,
    lines: Sequence[str],
    config: RunConfig,
    batch: int,
    stand_ins: StandIns,
    *,
    as_json: bool,
) -> None:
    images = [way.images(round(card * 1e9), batch) for way in found]
    if as_json:
        each = [way.to_dict() | {"images": n} for way, n in zip(found, images, strict=True)]
        of_card = {"card_gb": card, "batch_size": batch, "ways": each}
        _print_json(config, of_card, stand_ins.downloads)
        return
    fits = [way for way, n in zip(found, images, strict=True) if n]
    said = f"card     {card:g} GB: "
    if images[0] == batch:
        said += f"the run fits, all {batch} images of a step at a time"
    elif images[0]:
        said += f"the run fits, with --micro-batch {images[0]} or less"
    elif fits:
        said += f"too small for the run as it is; it fits with {fits[0].options}"
    else:
        said += (
            "too small; a smaller model, a smaller --batch-size or --batch-size-eval, "
            "--precision-eval amp_bf16, --precision bf16 or --fsdp on several cards need less"
        )
    out = _print_lines([*lines, *_of_downloads(stand_ins.downloads, config, measured=False), said])
    table = plain_table(
        "options", "held", "batch", "step", "more", "test", "images", names_wrap=True
    )
    for way, n in zip(found, images, strict=True):
        table.add_row(
            Text(way.options or "as given"),
            *map(megabytes, (way.held, most(way.kept, batch), way.step(1))),
            f"{way.image / 2**20:.1f} MiB",
            megabytes(way.evaluation),
            str(n) if n else "none fits",
        )
    out.print(table)
    out.print(_WAYS, style="dim", highlight=False)


def _outline(settings: Settings, stand_ins: StandIns, as_json: bool) -> None:
    # What can be said of a run without its model.
    config = settings.run
    method = methods.get(config.method)(settings.method)
    check_options(config, method)
    processes = launch.processes()
    if is_first():
        trackers.chosen(config.report_to)
        check_free(config.logs, config.name)
    with offline():
        tasks = load_data(settings, method, processes, stand_ins=stand_ins).tasks
    for name, pretrained in (
        (config.model, config.pretrained),
        (config.original, config.original_pretrained),
    ):
        if name is not None:
            stand_ins.downloads += not_here(name, pretrained)[1]
    # The processes of torchrun have nothing to tell each other here.
    if not is_first():
        return
    steps = steps_of_tasks(config, tasks, processes) if method.trains else [0] * len(tasks)
    rows = [
        {
            "name": task.name,
            "classes": len(task.classes),
            "train": len(task.train),
            "test": len(task.test),
            "steps": count,
        }
        for task, count in zip(tasks, steps, strict=True)
    ]
    if as_json:
        unknown = {"parameters": None, "trainable": None, "seconds": None}
        _print_json(config, {**unknown, "tasks": rows}, stand_ins.downloads)
        return
    what = of_tasks(config, method, tasks, processes)
    model = f"{config.model}, whose memory and time are known once its configuration is here"
    lines = in_lines({"run": what["run"], "model": model, "steps": what["steps"]})
    out = _print_lines([*lines, *_of_downloads(stand_ins.downloads, config, measured=False)])
    table = plain_table("task", "classes", "train", "test", "steps", names_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    out.print(table)


def _print_json(config: RunConfig, found: Mapping[str, Any], downloads: Sequence[Download]) -> None:
    about = {"method": config.method, "model": config.model}
    print(json.dumps({**about, **found, "downloads": [each.to_dict() for each in downloads]}))


def _print_lines(lines: Sequence[str]) -> Console:
    out = Console()
    wrapper = TextWrapper(
        out.width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
    )
    wrapped = "\n".join(
        line if isinstance(line, _Command) else wrapper.fill(line) for line in lines
    )
    out.print(Text(wrapped), soft_wrap=True)
    return out


def _of_downloads(downloads: Sequence[Download], config: RunConfig, *, measured: bool) -> list[str]:
    lines = [_of_download(each) for each in downloads]
    known = [each.bytes for each in downloads if each.bytes is not None]
    if len(downloads) > 1 and known:
        others = "" if len(known) == len(downloads) else ", without those of unknown size"
        lines.append(f"{_INDENT}{megabytes(sum(known))} in all{others}")
    kinds = {each.what for each in downloads}
    if measured and kinds - {"data set"}:
        tokenizer = " and a tokenizer of the same length" if "tokenizer" in kinds else ""
        lines.append(f"{_INDENT}random weights{tokenizer} stand in here; they cost the same")
    if "data set" in kinds:
        if measured:
            lines.append(
                f"{_INDENT}blank images stand in for the data sets, so the time to read and decode "
                "theirs comes on top"
            )
        lines += [f"{_INDENT}get the data sets with", *_commands(config)]
    return lines


def _commands(config: RunConfig) -> list[_Command]:
    # `mulki tasks --prepare` takes one sequence.
    words: dict[str, list[str]] = {}
    for word in config.tasks:
        if (sequence := word.partition(":")[0]) in COLLECTIONS:
            words.setdefault(sequence, []).append(word)
    options = ["--prepare", "--data-root", str(config.data_root)]
    options += ["--protocol", config.protocol] if config.protocol else []
    return [
        _Command(_INDENT + shlex.join(["mulki", "tasks", *of_one, *options]))
        for of_one in words.values()
    ]


def _of_download(each: Download) -> str:
    size = "of unknown size"
    if each.bytes is not None:
        size = megabytes(each.bytes)
    if each.estimated:
        size = f"about {size} (its parameters in float32)"
    by_hand = ", by hand" if each.by_hand else ""
    return f"download {each.what} {each.source}, {size}{by_hand}"


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
    titles = ("classes", "train", "test", "steps", "before", "step", "learn", "test all")
    table = plain_table("task", *titles, names_wrap=True)
    tested = sum(each.testing_again for each in costs.tasks)
    for each in costs.tasks:
        step = "-" if each.later_step is None else f"{each.later_step:.3g} s"
        table.add_row(
            Text(each.name),
            *map(str, (each.classes, each.train, each.test, each.steps)),
            clock(each.prepare),
            step,
            clock(each.learning),
            clock(tested),
        )
    return table
