"""``mulki eval``: a checkpoint on its tasks, each alone and among the classes of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from mulki.app.commands.parsing import Parser, add_options, with_hyphens
from mulki.choices.options import flag
from mulki.clip.evaluation import LabelSpace
from mulki.console import Console
from mulki.data import Task
from mulki.errors import InputError
from mulki.report.tables import folded_tables, plain_table
from mulki.runs.predictions import (
    TaskPredictions,
    check_writable,
    figures,
    write_classes,
    write_confusion,
    write_predictions,
)
from mulki.runs.reading import fingerprint

_FILES = {
    "predictions": (write_predictions, "a line for each image, with its likeliest five classes"),
    "per_class": (write_classes, "a line for each class, with its accuracy"),
    "confusion": (write_confusion, "a line for each right and predicted class, with their images"),
}
# Options that have their default whatever the run had.
_NOT_OF_A_RUN = ("workers", "device")
_LONG = 24  # characters of a name, beside which six recalls have room in 80
_TITLES = {"acc1": "top-1", "acc5": "top-5", "mean_per_class_recall": "per class"}


def evaluate(argv: list[str]) -> int:
    """Run the command with these arguments; return its exit status.

    Raises:
        InputError: bad arguments, checkpoint or tasks.
    """
    from mulki.train.config.run_config import RunConfig
    from mulki.train.learning.memory import keep_freed_memory
    from mulki.train.retest import OPTIONS, evaluation

    parser = Parser(
        prog="mulki eval",
        description="Evaluate a checkpoint: each task among its own classes and those of all",
        epilog="Options that are left out are those of the run that the checkpoint lies in. "
        "With --tasks, those of its own tasks are left aside. A copied checkpoint says itself what "
        "they were. Of other models they are those of mulki run, with --precision fp32.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="the folder of a run, a folder with an open_clip_config.json, or a file of weights; "
        "--model names the model of a file that mulki has not written",
    )
    for name in OPTIONS:
        add_options(parser, RunConfig, only=name, defaults=name in _NOT_OF_A_RUN)
    for name, (_, what) in _FILES.items():
        parser.add_argument(flag(name), metavar="FILE.csv", type=Path, help=what)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = vars(parser.parse_args(with_hyphens(argv)))
    keep_freed_memory()
    checkpoint, as_json = Path(given.pop("checkpoint")), given.pop("json")
    files = {name: given.pop(name) for name in _FILES}
    taken: dict[Path, str] = {}
    for name, path in files.items():
        if path is not None:
            check_writable(flag(name), path)
            first = taken.setdefault(path.resolve(), name)
            if first != name:
                raise InputError(
                    f"{flag(name)}: got {path}, which {flag(first)} writes too; pass another"
                )
    chosen = evaluation(checkpoint, {k: v for k, v in given.items() if v is not None})
    hashes = chosen.hashes
    _check_files(files, chosen.tasks)
    found, recalls = list(chosen.predictions()), chosen.recalls()
    unwritten = _written(files, found)
    if as_json:
        of = {"checkpoint": str(checkpoint), "label_space": chosen.label_space}
        captions = [
            {"task": task} | {name: value for name, (value, _) in each.items()}
            for task, each in recalls.items()
        ]
        print(json.dumps({**of, **_numbers(found), "captions": captions, "hashes": hashes}))
    else:
        if recalls:
            _print_recalls(recalls)
        if found:
            _print(found, chosen.label_space)
        Console().print(fingerprint(hashes), highlight=False, style="dim")
    if unwritten is not None:
        raise unwritten
    return 0


def _written(files: Mapping[str, Path | None], found: Sequence[TaskPredictions]) -> OSError | None:
    # Writes the files; what it fails with is raised once the figures are printed.
    try:
        for name, path in files.items():
            if path is not None:
                _FILES[name][0](path, found)
    except OSError as error:
        return error
    return None


def _check_files(files: Mapping[str, Path | None], tasks: Sequence[Task]) -> None:
    given = [name for name, path in files.items() if path is not None]
    if given and not any(task.classes for task in tasks):
        raise InputError(
            f"{flag(given[0])}: is about classes, and the tasks have captions; leave it out"
        )


def _numbers(found: Sequence[TaskPredictions]) -> dict[str, Any]:
    # `all` is among the classes of all tasks; on the top level over their images too.
    tasks = [
        {
            "task": of.task,
            "images": len(of.names),
            "own": figures([of.own]),
            "all": figures([of.union]),
        }
        for of in found
    ]
    numbers = {"tasks": tasks, "all": figures([of.union for of in found]) if found else None}
    if heads := [of.with_head for of in found if of.with_head is not None]:
        numbers["with_head"] = _numbers(heads)
    return numbers


def _print_recalls(recalls: Mapping[str, Mapping[str, tuple[float, int]]]) -> None:
    figures_of_each = next(iter(recalls.values()))
    titles = [name.replace("_", " ") for name in figures_of_each]
    rows = [
        (task, [f"{value:.2f}" for value, _ in each.values()]) for task, each in recalls.items()
    ]
    console = Console()
    if max(cell_len(task) for task in recalls) > _LONG:
        console.print(*folded_tables(console.width, "captions", titles, rows), sep="\n")
        return
    table = plain_table("captions", *titles)
    for task, cells in rows:
        table.add_row(Text(task), *cells)
    console.print(table)


def _print(found: Sequence[TaskPredictions], label_space: LabelSpace | None) -> None:
    numbers, console = _numbers(found), Console()
    forms = [("", numbers)]
    if "with_head" in numbers:
        forms = [(", by texts alone", numbers), (", with head", numbers["with_head"])]
    for words, of in forms:
        console.print(Text(f"among the classes of its task{words}", style="bold"))
        console.print(_table(of, "own"), "", sep="\n")
        console.print(Text(f"among the classes of all tasks here{words}", style="bold"))
        console.print(_table(of, "all"), "", sep="\n")
    said = ["in percent; per class: the mean over classes"]
    if label_space is not None:
        said.append(f"matrix.csv of the run is in label space {label_space}")
    for line in said:
        console.print(line, highlight=False, style="dim")


def _table(numbers: Mapping[str, Any], space: str) -> Table:
    # Of the own classes the mean of the tasks, since no two are about the same; of all the total.
    table = plain_table("task", "images", *_TITLES.values(), names_wrap=True)

    def cells(of: Mapping[str, float | None]) -> list[str]:
        return ["-" if of[name] is None else f"{of[name]:.2f}" for name in _TITLES]

    for of in numbers["tasks"]:
        table.add_row(Text(of["task"], overflow="fold"), str(of["images"]), *cells(of[space]))
    if space == "all":
        total = sum(of["images"] for of in numbers["tasks"])
        table.add_row("all images", str(total), *cells(numbers["all"]))
        return table
    each = [of["own"] for of in numbers["tasks"]]
    means = {
        name: sum(of[name] for of in each) / len(each)
        if all(of[name] is not None for of in each)
        else None
        for name in _TITLES
    }
    table.add_row("mean", "", *cells(means))
    return table
