"""``report.html``: one self-contained page made of a run folder and of nothing else."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mulki.data.sequences import has_orders
from mulki.data.subset import in_turns
from mulki.errors import counted
from mulki.report.contents import RunContents
from mulki.report.figures import plots
from mulki.report.pages import page_file, render
from mulki.report.tables import TITLES, display_columns, display_rows, recalls_of
from mulki.runs.answers import ACC1, RECALL1, Answers
from mulki.runs.catalog import DataSet, Example
from mulki.runs.history import mean_seconds
from mulki.runs.metrics import (
    DEFINITIONS,
    MEAN_DISTANCE,
    NOTATION,
    WORD_AGREEMENT,
    ZERO_SHOT,
)

# Rows of all tables of classes together, and images: the page stays below 3 MB.
_CLASSES, _IMAGES = 3000, 160
_MINUS, _ARROW = "\N{MINUS SIGN}", "\N{RIGHTWARDS ARROW}"
# Tasks that are named in the sentence at the top, and pairs of classes below a table.
_NAMED, _CONFUSED = 8, 5


def render_html(contents: RunContents) -> str:
    """Return the page for a run; it needs no network and no other file."""
    data = contents.data
    matrix = data.matrix
    return render(
        page_file("page.html"),
        title=data.name,
        status=data.status,
        facts=_facts(contents),
        in_words=_in_words(contents),
        missing=contents.missing,
        columns=display_columns(matrix),
        rows=list(display_rows(matrix)) if contents.evaluated else [],
        seen=data.class_incremental.after,
        test_images=_table(data.summary.get("test_images")),
        metrics=_metrics(contents),
        notation=NOTATION,
        has_head=data.with_head is not None,
        has_zero_shot=matrix.zero_shot_metrics() is not None,
        figures=plots(contents),
        classes=_classes(contents),
        recalls=_recalls(contents),
        examples=_examples(contents.examples),
        drift=_drift(contents),
        times=_times(contents),
        fingerprint=data.fingerprint,
        config=data.config,
        environment=_flat(data.environment),
    )


def _facts(contents: RunContents) -> list[str]:
    summary, options = contents.data.summary, contents.options
    named = ("method", "model", "pretrained")
    facts = [f"{key} {options[key]}" for key in named if options.get(key) is not None]
    if "method" in summary and "method" not in options:
        facts.append(f"method {summary['method']}")
    tasks = options.get("tasks")
    spec = [str(task) for task in tasks] if isinstance(tasks, list) else []
    orders = has_orders(spec, str(summary.get("order", "I")))
    shown = ("order", "seed") if orders else ("seed",)
    facts += [f"{key} {summary[key]}" for key in shown if key in summary]
    matrix = contents.data.matrix
    earlier = contents.learned_elsewhere
    if matrix.columns:
        learned = len(matrix.tasks) + len(earlier)
        facts.append(f"{learned} of {len(matrix.columns)} tasks learned")
    if earlier:
        facts.append(f"without a row, and in no metric: {', '.join(earlier)}, of an earlier run")
    counts = contents.data.environment.get("parameters")
    if isinstance(counts, dict) and all(isinstance(n, int) for n in counts.values()):
        facts += [f"{n:,} parameters {name}" for name, n in counts.items()]
    seconds = summary.get("seconds")
    if isinstance(seconds, (int, float)) and abs(seconds) < math.inf:
        minutes, rest = divmod(round(seconds), 60)
        facts.append(f"took {minutes // 60}:{minutes % 60:02d}:{rest:02d}")
    if isinstance(date := contents.data.environment.get("date"), str):
        facts.append(date)
    return facts


def _in_words(contents: RunContents) -> str:
    # What was learned, in a sentence or two; nothing before the first task.
    matrix = contents.data.matrix
    learned = [name for name in matrix.tasks if name in matrix.columns]
    if not learned:
        return ""
    places = [matrix.columns.index(name) for name in learned]
    last = [matrix.rows[-1][place] for place in places]
    start = None if matrix.zero_shot is None else [matrix.zero_shot[place] for place in places]
    mean = f"{np.mean(last):.1f}"
    before = [""] * len(last) if start is None else [f"{value:.1f} {_ARROW} " for value in start]
    if start is not None:
        mean = f"{np.mean(start):.1f} {_ARROW} {mean}"
    said = f"Learned {counted(len(matrix.tasks), 'task')}: mean {mean} %."
    if len(learned) > _NAMED:
        return said
    each = []
    for name, old, new in zip(learned, before, last, strict=True):
        best = max(row[matrix.columns.index(name)] for row in matrix.rows)
        peak = f" (at best {best:.1f})" if f"{best:.1f}" != f"{new:.1f}" else ""
        each.append(f"{name} {old}{new:.1f}{peak}")
    return f"{said} {', '.join(each)}."


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _metrics(contents: RunContents) -> list[tuple[str, str, str, str, str]]:
    # Title, value, that with a head, that of a model that never changed, definition.
    matrix, seen = contents.data.matrix, contents.data.class_incremental
    if not matrix.tasks:
        return []
    zero = matrix.zero_shot_metrics()
    before = {} if zero is None else zero.to_dict()
    with_head = contents.data.with_head
    heads = {} if with_head is None else with_head.metrics()
    titles = {
        **TITLES,
        "cil_average": "Class-incremental average",
        "cil_last": "Class-incremental last",
    }
    found = matrix.metrics().to_dict() | seen.metrics()
    return [
        (
            title,
            _number(found[key]),
            _number(heads.get(f"head_{key}")),
            _number(before.get(key)),
            DEFINITIONS[key],
        )
        for key, title in titles.items()
        if found[key] is not None or key in TITLES
    ]


def _number(value: float | None, digits: int = 2, sign: str = "") -> str:
    if value is None:
        return ""
    if not round(value, digits):
        value, sign = 0.0, ""
    return f"{value:{sign}.{digits}f}".replace("-", _MINUS)


@dataclass(frozen=True)
class _Classes:
    # A data set's table: headings of accuracies, then (class, images, accuracies) in each row.
    name: str
    columns: tuple[str, ...]
    rows: list[tuple[str, int, list[str]]]
    left_out: int
    confused: list[str]


def _classes(contents: RunContents) -> list[_Classes]:
    if not contents.answers:
        return []
    sets = contents.data_sets
    names = [n for n in display_columns(contents.data.matrix) if n in sets and sets[n].classes]
    most = max(_CLASSES // max(len(names), 1), 10)
    return [
        table
        for name in names
        if (table := _of_data_set(contents, contents.data_sets[name], most)) is not None
    ]


def _of_data_set(contents: RunContents, each: DataSet, most: int) -> _Classes | None:
    tasks = contents.data.matrix.tasks
    wanted = {"zero-shot": ZERO_SHOT, "learned": each.name, "last": tasks[-1] if tasks else ""}
    rows = {
        title: contents.answers[row] for title, row in wanted.items() if row in contents.answers
    }
    targets = np.asarray(each.targets)
    if any(len(row[each.name].own) != len(targets) for row in rows.values()):
        return None
    images = np.bincount(targets, minlength=len(each.classes))
    accuracy = {
        title: 100
        * np.bincount(targets, weights=row[each.name].own, minlength=len(each.classes))
        / np.maximum(images, 1)
        for title, row in rows.items()
    }
    if {"zero-shot", "last"} <= accuracy.keys():
        accuracy["change"] = accuracy["last"] - accuracy["zero-shot"]
    order = [place for place in range(len(each.classes)) if images[place]]
    if "change" in accuracy:
        order.sort(key=lambda place: -abs(accuracy["change"][place]))
    shown = sorted(order[:most])
    if "change" in accuracy:  # what was lost comes first
        shown.sort(key=lambda place: accuracy["change"][place])
    return _Classes(
        each.name,
        tuple(accuracy),
        [
            (
                each.classes[place],
                int(images[place]),
                [
                    _number(float(values[place]), 1, "+" if title == "change" else "")
                    for title, values in accuracy.items()
                ],
            )
            for place in shown
        ],
        len(order) - len(shown),
        _confused(contents, each, rows["last"][each.name]) if "last" in rows else [],
    )


def _confused(contents: RunContents, of: DataSet, answers: Answers) -> list[str]:
    # The pairs of a right and a said class that most images have, in words.
    # Said classes are counted over all data sets, so that none may be missing.
    if answers.said is None or not contents.data_sets.keys() >= {*contents.data.matrix.columns}:
        return []
    every = [name for each in contents.data_sets.values() for name in each.classes]
    wrong = Counter(
        (of.classes[target], every[said])
        for target, said, right in zip(of.targets, answers.said, answers.own, strict=True)
        if not right and every[said] != of.classes[target]
    )
    return [
        f"{right} as {said} ({count})"
        for (right, said), count in wrong.most_common(_CONFUSED)
        if count > 1
    ]


@dataclass(frozen=True)
class _Recalls:
    # Headings, then (data set, model, recalls) in each row.
    columns: tuple[str, ...]
    rows: list[tuple[str, str, list[str]]]


def _recalls(contents: RunContents) -> _Recalls | None:
    found = recalls_of(contents.evaluations)
    matrix = contents.data.matrix
    rows = []
    for name in (name for name in display_columns(matrix) if name in found):
        wanted = {"zero-shot": ZERO_SHOT, "learned": name, "last": ("", *matrix.tasks)[-1]}
        rows += [
            (name, title, [_number(value, 1) for value in found[name][row].values()])
            for title, row in wanted.items()
            if row in found[name]
        ]
    columns = next((tuple(each) for of in found.values() for each in of.values()), ())
    return _Recalls(tuple(name.replace("_", " ") for name in columns), rows) if rows else None


def _examples(examples: list[Example]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for each in examples:
        found.setdefault(each.data_set, []).append(each)
    most = max(_IMAGES // max(len(found), 1), 1)
    # Half of them gained and half lost, where there are as many.
    return {
        name: sorted(of, key=lambda e: e.kind)
        if len(of) <= most
        else [of[place] for place in in_turns([e.kind for e in of])[:most]]
        for name, of in found.items()
    }


@dataclass(frozen=True)
class _Rows:
    columns: tuple[str, ...]
    rows: list[tuple[str, list[str]]]


def _drift(contents: RunContents) -> dict[str, _Rows]:
    # By caption.
    columns = display_columns(contents.data.matrix)
    found = {}
    for metric, caption, digits in (
        (WORD_AGREEMENT, "Same nearest word as the original model, percent of the images", 1),
        (MEAN_DISTANCE, "Distance of the class means from those that were kept", 4),
    ):
        values: dict[str, dict[str, float]] = {}
        for one in contents.evaluations:
            if one.metric == metric:
                values.setdefault(one.after_task, {})[one.eval_dataset] = one.value
        rows = [
            (after, [_number(of.get(column), digits) for column in columns])
            for after, of in values.items()
        ]
        if rows:
            found[caption] = _Rows(columns, rows)
    return found


def _times(contents: RunContents) -> _Rows | None:
    steps: dict[str, list[Any]] = {}
    for record in contents.history:
        steps.setdefault(record.task, []).append(record)
    tests: dict[str, float] = {}
    for one in contents.evaluations:
        if one.metric in (ACC1, RECALL1):
            tests[one.after_task] = tests.get(one.after_task, 0.0) + one.seconds
    rows = []
    for name in dict.fromkeys((*tests, *steps)):
        records = steps.get(name, [])
        prepared = next((r.prepared for r in records if r.prepared is not None), None)
        each = mean_seconds(records)
        rows.append(
            (
                name,
                [
                    _number(prepared, 1),
                    str(records[-1].step) if records else "",
                    _number(1000 * sum(each.values()), 0) if each else "",
                    _number(float(np.mean([r.images_per_second for r in records])), 0)
                    if records
                    else "",
                    _number(tests.get(name), 1),
                ],
            )
        )
    columns = (
        "before the first step, s",
        "last step written",
        "a step, ms",
        "images per second",
        "tests after it, s",
    )
    return _Rows(columns, rows) if rows else None


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        items = [
            _flat(item, f"{prefix}: {key}" if prefix else str(key)) for key, item in value.items()
        ]
        return {name: text for item in items for name, text in item.items()}
    if isinstance(value, list):
        return {prefix: ", ".join(map(str, value)) or "-"}
    return {prefix: "-" if value is None else str(value)}
