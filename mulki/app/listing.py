"""What `mulki tasks` prints: sequences, their tasks, and published data sets with their state."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.text import Text

from mulki.console import Console
from mulki.data import CaptionTask, Source, Task, sequence_names
from mulki.data.published import Entry, entry
from mulki.data.published.collections import COLLECTIONS, Collection
from mulki.data.published.prepare import prepare
from mulki.data.sequences import order_without_sequence, without_effect
from mulki.errors import InputError
from mulki.printing import say
from mulki.report.tables import plain_table
from mulki.train.config.run_config import RunConfig
from mulki.train.config.tasks import load_tasks
from mulki.train.display.progress import megabytes


def list_tasks(config: RunConfig, *, as_json: bool = False, download: bool = False) -> int:
    """Print the tasks that a user names, or all sequences where none are.

    Published data sets are listed from their facts where no data root is given.

    Args:
        config: names the tasks, and says how they are read.
        as_json: print names and classes as JSON.
        download: download what is missing of published data sets, and check them.

    Returns:
        The exit status of the command: 1 if a data set is missing after a download.

    Raises:
        InputError: what `load_sequence` refuses, a download of other tasks than published ones, or
            a download as JSON.
    """
    names, source = config.tasks, Source(config.data_root, config.protocol)
    if download and as_json:
        raise InputError("--json: --prepare prints a table; leave one of the two out")
    if download and not names:
        raise InputError("--prepare: got no tasks; name those to download, such as mtil")
    if not names:
        print(json.dumps(sequence_names()) if as_json else "\n".join(sequence_names()))
        return 0
    published = _published(names, config.order)
    if published is not None and config.test_fraction is not None:
        raise without_effect(config.test_fraction)
    if download:
        if published is None:
            raise InputError(
                f"--prepare: got {' '.join(names)}, wanted published data sets of one "
                "sequence, such as mtil or mtil:dtd; name these alone"
            )
        return _prepare(*published, source)
    if published is not None and source.root is None:
        _print_facts(*published, source, as_json)
        return 0
    tasks = load_tasks(config)
    if as_json:
        _print_json([(task.name, task.classes) for task in tasks])
        return 0
    table = plain_table("task", "classes", "train", "test", names_wrap=True)
    table.add_column("prompt")
    for task in tasks:
        classes, prompt = "-", "the captions"
        if not isinstance(task, CaptionTask):
            classes, prompt = str(len(task.classes)), task.templates[0]
        counts = classes, str(len(task.train)), str(len(task.test))
        table.add_row(_folded(task.name), *counts, _folded(prompt))
    Console().print(table)
    for task in tasks:
        if task.skipped:
            say(f"{task.name}: unreadable images left out: {len(task.skipped)}")
    return 0


def _folded(words: str) -> Text:
    # A word that is wider than its column goes on in the next line, and none is cut.
    return Text(words, overflow="fold")


def _published(names: Sequence[str], order: str) -> tuple[Collection, tuple[str, ...]] | None:
    # The collection that all these words belong to, and the data sets of it that they name.
    words = [name.partition(":") for name in names]
    collection = COLLECTIONS.get(words[0][0])
    if collection is None or any(word[0] != collection.name for word in words):
        return None
    if len(words) == 1 and not words[0][1]:
        return collection, collection.in_order(order) if collection.orders else collection.members
    if order != "I":
        raise order_without_sequence(order)
    for _, _, member in words:
        collection.check_member(member)
    return collection, tuple(member for _, _, member in words)


def _print_json(tasks: Sequence[tuple[str, Sequence[str]]]) -> None:
    print(json.dumps([{"name": name, "classes": list(classes)} for name, classes in tasks]))


def _print_facts(
    collection: Collection, members: tuple[str, ...], source: Source, as_json: bool
) -> None:
    facts = [entry(name) for name in members]
    if as_json:
        _print_json([(each.name, each.classes) for each in facts])
        return
    protocol = collection.source(source).protocol
    assert protocol is not None
    table = plain_table("task", "classes", "train", "test", "download", names_wrap=True)
    table.add_column("data set")
    table.add_column("licence")
    for each in facts:
        of = each.protocol(protocol)
        train = "?" if of.train is None else str(of.train)
        size = megabytes(each.download.bytes) if each.download is not None else "?"
        numbers = (str(of.num_classes), train, str(of.test), size)
        table.add_row(*map(_folded, (each.name, *numbers, each.title, each.licence)))
    console = Console()
    console.print(table)
    console.print(
        f"As published, with the protocol {protocol}. Read them with --data-root DIR, or "
        f"mulki tasks {collection.name} --prepare --data-root DIR to download them.",
        highlight=False,
    )


def _prepare(collection: Collection, members: tuple[str, ...], source: Source) -> int:
    console = Console(stderr=True)
    table = plain_table("task", "train", "test", names_wrap=True)
    table.add_column("state")
    table.add_column("data set")
    problems = []

    def says(words: str) -> None:
        console.print(Text(words), soft_wrap=True)

    for state in prepare(collection, members, source, says):
        facts: Entry = entry(state.name)
        task: Task | None = state.task
        numbers = ("", "") if task is None else (str(len(task.train)), str(len(task.test)))
        words = "ready" if not state.problem else "missing" if task is None else "damaged"
        table.add_row(*map(_folded, (state.name, *numbers, words, facts.title)))
        if state.problem:
            problems.append(state.problem)
    Console().print(table)
    for problem in problems:
        say(problem)
    return 1 if problems else 0
