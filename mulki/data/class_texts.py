"""More names and descriptions of classes, which are prompts beside those of the templates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mulki.data.prompts import fill
from mulki.data.task import Task
from mulki.errors import InputError, nearest
from mulki.files import read_table

FILE = "class_texts.csv"


def with_class_texts(task: Task, path: Path) -> Task:
    """The task with the texts of `class_texts.csv` in its folder or beside its file, if there.

    Files that lie in one folder may each have their own: that of `birds.csv`, or `birds_train.csv`,
    is `birds_class_texts.csv`, which goes before the other.

    Its columns are `class`, and `name`, `description` or both. A name is filled into each template
    beside that of the class, a description is a prompt as it stands; a cell may be empty, and a
    class may have any number of rows. A task that is only tested may lack some of the classes.

    Args:
        task: it.
        path: the folder, or the CSV file, that it was read from.

    Raises:
        InputError: not such a file, a class that the task has not, or a text that it has already.
    """
    file, remedy = path / FILE, "or remove the row"
    if not path.is_dir():
        own = path.with_name(f"{task.name}_{FILE}")
        file = own if own.is_file() else path.with_name(FILE)
        remedy += f"; if it is of another task, move the rows of this one to {own.name}"
    if not file.is_file():
        return task
    wanted = "a CSV with the columns class, and name, description or both"
    texts: dict[str, list[str]] = {name: [] for name in task.classes}
    prompts = dict(zip(task.classes, task.prompts(), strict=True))
    header, rows = read_table(file, wanted, ("class",), ("name", "description"))
    if not {"name", "description"} & set(header):
        raise InputError(f"{file}: has neither a column name nor description; add one of them")
    for row in rows:
        owner = row.cells["class"]
        if owner not in texts and task.test_only:
            continue
        if owner not in texts:
            raise InputError(
                f"{row.where}: task {task.name} has no class {owner!r}{nearest(owner, texts)}; "
                f"correct the name, {remedy}"
            )
        name, described = (row.cells.get(column, "") for column in ("name", "description"))
        new = [fill(template, name) for template in task.templates] if name else []
        for text in [*new, *([described] if described else [])]:
            if text in (*prompts[owner], *texts[owner]):
                raise InputError(
                    f"{row.where}: class {owner} has the text {text!r} already; remove one of them"
                )
            texts[owner].append(text)
    return dataclasses.replace(task, texts=tuple(map(tuple, texts.values())))
