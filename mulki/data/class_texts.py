"""More names and descriptions of classes, which are prompts beside those of the templates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mulki.data.prompts import fill
from mulki.data.task import Task
from mulki.errors import InputError, nearest
from mulki.files import read_table

FILE = "class_texts.csv"


def with_class_texts(task: Task, folder: Path) -> Task:
    """The task with the texts of `folder/class_texts.csv`, if there is such a file.

    Its columns are `class`, and `name`, `description` or both. A name is filled into each template
    beside that of the class, a description is a prompt as it stands; a cell may be empty, and a
    class may have any number of rows.

    Raises:
        InputError: not such a file, a class that the task has not, or a text that it has already.
    """
    file = folder / FILE
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
        if owner not in texts:
            raise InputError(
                f"{row.where}: task {task.name} has no class {owner!r}{nearest(owner, texts)}; "
                "correct the name, or remove the row"
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
