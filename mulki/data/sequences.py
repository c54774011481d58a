"""Sequences of tasks by name, and what a user may write where tasks are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mulki.choices.registration import place_of, register
from mulki.data.caption_files import caption_task
from mulki.data.class_texts import with_class_texts
from mulki.data.csv_files import CsvForm, csv_task, csv_with_validation
from mulki.data.folders import folder_task
from mulki.data.huggingface_tasks import holds_dataset, huggingface_task, validation_split
from mulki.data.image_files import validation_folder
from mulki.data.published import Source
from mulki.data.published.collections import COLLECTIONS, Collection, permuted
from mulki.data.shard_tasks import holds_shards, shard_task
from mulki.data.task import Task
from mulki.errors import InputError, nearest

Loader = Callable[[str], list[Task]]

# Before the path of a task whose examples are images with captions.
_CAPTIONS = "captions"

_SEQUENCES: dict[str, Loader | Collection] = dict(COLLECTIONS)


def register_sequence(name: str) -> Callable[[Loader], Loader]:
    """Decorate a function from an order to a list of tasks, to make it a sequence called `name`.

    The function raises InputError, with the orders it knows, for one it does not.

    Raises:
        InputError: the name is empty, taken, "captions" or holds a colon.
    """
    if name == _CAPTIONS:
        raise InputError(
            f'task sequence "{name}": {name}:PATH is a task of images with captions; take another '
            "name"
        )
    if ":" in name:
        raise InputError(
            f'task sequence "{name}": a colon separates a sequence from a task; leave it out'
        )

    def decorate(loader: Loader) -> Loader:
        register(_SEQUENCES, "task sequence", name, loader)
        return loader

    return decorate


def sequence_names() -> tuple[str, ...]:
    """Names of the registered sequences, sorted."""
    return tuple(sorted(_SEQUENCES))


def has_orders(spec: Sequence[str], order: str = "I") -> bool:
    """Whether the tasks are of a named sequence, whose orders have names.

    Args:
        spec: as of `load_sequence`.
        order: of the tasks; if it is not "I" they are, even if no such sequence is registered here.
    """
    found = _SEQUENCES.get(spec[0]) if len(spec) == 1 else None
    if isinstance(found, Collection):
        return bool(found.orders)
    return order != "I" or found is not None


def load_sequence(
    spec: Sequence[str],
    order: str = "I",
    *,
    skip_bad_images: bool = False,
    test_fraction: float | None = None,
    test_only: bool = False,
    inherited: bool = False,
    form: CsvForm = CsvForm(),
    source: Source = Source(),
) -> list[Task]:
    """Load the tasks that a user names.

    Args:
        spec: one registered sequence; or, in the order in which they are to be learned, any number
            of folders (see `folder_task`, `shard_task` for those with tar shards, and
            `huggingface_task` for data sets of Hugging Face), CSV files (see `csv_task`), images
            with captions, as "captions:PATH" (see `caption_task`), and single tasks of a sequence,
            as "embedded:digits". A registered name goes before a folder of the same name, which
            "./name" reaches.
        order: order of the registered sequence, by name or as names of all its tasks with commas
            between; "I" where the tasks are listed one by one.
        skip_bad_images: leave unreadable images of folders and files out.
        test_fraction: the share of the images to test on, of folders and files without a split of
            their own.
        test_only: see `Task`; not of a sequence.
        inherited: the options are those of an earlier run with other tasks, so that a test fraction
            or a protocol that no task here needs is no error.
        form: of CSV files.
        source: where published data sets lie, and the protocol to read them with.

    Raises:
        InputError: a word that names nothing, an unknown order, two tasks of one name, a sequence
            that returns no list of tasks, a protocol without published data sets, a test fraction
            where all tasks have a split, or what the functions above and `published_task` raise.
    """
    words = [spec] if isinstance(spec, str) else list(spec)
    if not words:
        raise InputError(
            f"no tasks given; name a sequence ({', '.join(sequence_names())}), "
            "task folders or CSV files"
        )
    _check_protocols(words, source, inherited)
    wanted = None if inherited else test_fraction
    if wanted is not None and all(word.partition(":")[0] in _SEQUENCES for word in words):
        raise without_effect(wanted)  # before data sets of many images are read
    if len(words) == 1 and words[0] in _SEQUENCES:
        return _in_order(words[0], order, source)
    if order != "I":
        raise order_without_sequence(order)
    how = {
        "skip_bad_images": skip_bad_images,
        "test_fraction": test_fraction,
        "test_only": test_only,
    }
    tasks = [_load_task(word, source, form, how) for word in words]
    tasks = [
        with_class_texts(task, Path(word))
        if word.partition(":")[0] not in (*_SEQUENCES, _CAPTIONS)
        else task
        for word, task in zip(words, tasks, strict=True)
    ]
    if wanted is not None and all(task.test_fraction is None for task in tasks):
        raise without_effect(wanted)
    sources: dict[str, str] = {}
    for word, task in zip(words, tasks, strict=True):
        if task.name in sources:
            raise InputError(
                f'{word}: a second task called "{task.name}", after {sources[task.name]}; '
                "rename one of the two folders or files"
            )
        sources[task.name] = word
    return tasks


def _check_protocols(words: Sequence[str], source: Source, inherited: bool) -> None:
    loaders = [_SEQUENCES.get(word.partition(":")[0]) for word in words]
    protocols = {
        each.source(source).protocol: word
        for each, word in zip(loaders, words, strict=True)
        if isinstance(each, Collection)
    }
    if source.protocol is not None and not protocols and not inherited:
        raise InputError(
            f"--protocol: got {source.protocol}, but none of the tasks is a published data set; "
            "leave it out"
        )
    if len(protocols) > 1:
        each = ", ".join(f"{word} with {protocol}" for protocol, word in protocols.items())
        raise InputError(
            f"--protocol: got {each}; figures of two protocols do not compare, so pass one that "
            "all have, or run them apart"
        )


def without_effect(test_fraction: float) -> InputError:
    """The error for a test fraction where all tasks have a split of their own."""
    return InputError(
        f"--test-fraction {test_fraction:g}: about tasks without a split, but all tasks here have "
        "one, so this changes nothing; leave it out"
    )


def order_without_sequence(order: str) -> InputError:
    """The error of an order that is given with single tasks."""
    return InputError(
        f'order "{order}": orders belong to a named sequence ({", ".join(sequence_names())}); '
        "tasks listed one by one are learned as listed, so leave the order out"
    )


def _in_order(sequence: str, order: str, source: Source) -> list[Task]:
    loader = _SEQUENCES[sequence]
    if isinstance(loader, Collection):
        return loader.tasks(order, source)
    if "," not in order:
        return _tasks_of(sequence, loader, order)
    tasks = {task.name: task for task in _tasks_of(sequence, loader, "I")}
    return [tasks[name] for name in permuted(tuple(tasks), order, sequence, ("I",))]


def _tasks_of(sequence: str, loader: Loader, order: str) -> list[Task]:
    tasks = loader(order)
    if not isinstance(tasks, (list, tuple)) or not all(isinstance(task, Task) for task in tasks):
        came = type(tasks).__name__
        if isinstance(tasks, (list, tuple)):
            came += f" of {next(type(t).__name__ for t in tasks if not isinstance(t, Task))}"
    elif not tasks:
        came = "an empty list"
    else:
        return list(tasks)
    raise InputError(
        f'task sequence "{sequence}": its function ({place_of(loader)}) returned {came}, wanted a '
        "list of mulki.data.Task; return one, such as those of dataset_task"
    )


def has_validation(word: str, form: CsvForm = CsvForm()) -> bool:
    """Whether a folder or a CSV file has validation images of its own; false for other words.

    Args:
        word: for a task, as of `load_sequence`.
        form: of CSV files.

    Raises:
        InputError: a file that cannot be read.
    """
    path = Path(word)
    if not path.exists():
        return False
    if _is_csv(path):
        return csv_with_validation(path, form)
    found = validation_split if holds_dataset(path) else validation_folder
    return found(path) is not None


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv") and not path.is_dir()


def _load_task(word: str, source: Source, form: CsvForm, how: Mapping[str, Any]) -> Task:
    # `how` has the arguments that all readers of folders and files take.
    if word in _SEQUENCES:
        raise InputError(
            f"{word}: a whole sequence stands alone; to combine, list its tasks one by one, "
            f"as {word}:NAME (a folder of that name is ./{word})"
        )
    sequence, colon, name = word.partition(":")
    if colon and sequence == _CAPTIONS:
        return caption_task(name, form=form, **how)
    if colon and sequence in _SEQUENCES:
        loader = _SEQUENCES[sequence]
        if isinstance(loader, Collection):
            return loader.task(name, source)
        tasks = {task.name: task for task in _tasks_of(sequence, loader, "I")}
        if name not in tasks:
            raise InputError(
                f"{word}: {sequence} has no such task{nearest(name, tasks)}; "
                f"it has {', '.join(tasks)}"
            )
        return tasks[name]
    if not Path(word).exists():
        raise InputError(
            f"{word}: neither a sequence{nearest(word, _SEQUENCES)} nor an existing folder or CSV "
            f"file; sequences are {', '.join(sequence_names())}"
        )
    if _is_csv(Path(word)):
        return csv_task(word, form=form, **how)
    read = folder_task
    if holds_dataset(Path(word)):
        read = huggingface_task
    elif holds_shards(Path(word)):
        read = shard_task
    return read(word, **how)


@register_sequence("embedded")
def _embedded(order: str) -> list[Task]:
    from mulki.data.embedded import embedded_sequence

    return embedded_sequence(order)
