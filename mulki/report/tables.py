"""An accuracy matrix and its metrics as tables for the terminal and for Markdown.

Learned tasks come first, in the order learned, then the other data sets, so that what was
learned is the lower left triangle. Marks and not colours alone carry the meaning: output is
piped, printed and read by people who do not see the colours.
"""

from __future__ import annotations

import html
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mulki.console import Console
from mulki.errors import counted
from mulki.runs.metrics import (
    DEFINITIONS,
    NOTATION,
    ZERO_SHOT,
    AccuracyMatrix,
    ClassIncremental,
    Metrics,
)
from mulki.runs.results import Evaluation
from mulki.runs.with_head import WithHead

#: What a cell says: just learned, learned earlier, not learned (yet).
Cell = Literal["learned", "kept", "other"]

LEGEND = "in percent; * just learned, + learned earlier, no mark: all others"

TITLES: dict[str, str] = {
    "transfer": "Transfer",
    "average": "Average",
    "last": "Last",
    "forgetting": "Forgetting",
    "bwt": "BWT",
}

_MARKS: dict[Cell, str] = {"learned": "*", "kept": "+", "other": " "}
_STYLES: dict[Cell, str] = {"learned": "bold green", "kept": "", "other": "dim"}
_MIN_CELL = len("100.0*")
_SOFT_HEADER = 8
_MAX_CELL = 12
_MAX_LABEL = 20
# Names of rows are cut into lines of at least so many, and words in cells into lines of so many.
_LEAST_LABEL, _LEAST_WORDS = 20, 12


def display_columns(matrix: AccuracyMatrix) -> tuple[str, ...]:
    """Return the columns as shown: tasks in the order learned, then the rest as they came."""
    rest = (column for column in matrix.columns if column not in matrix.tasks)
    return (*matrix.tasks, *rest)


def display_rows(
    matrix: AccuracyMatrix,
) -> Iterator[tuple[str, list[tuple[float, Cell]]]]:
    """Yield the name of each row and its cells, in the order of :func:`display_columns`."""
    columns = display_columns(matrix)
    order = [matrix.columns.index(column) for column in columns]
    first = 0 if matrix.zero_shot is None else -1
    for i, (name, row) in enumerate(matrix.named_rows(), start=first):
        yield name, [(row[j], _cell_kind(i, k, len(matrix.tasks))) for k, j in enumerate(order)]


def _cell_kind(i: int, k: int, learned: int) -> Cell:
    if k >= learned or k > i:
        return "other"
    return "learned" if k == i else "kept"


def matrix_table(matrix: AccuracyMatrix, width: int = 100) -> Group:
    """Return the matrix, in percent, as rich tables no wider than ``width`` characters.

    One table as long as the columns fit; more, each with some of the columns, when they do not,
    since a shortened number would be a wrong one. A ``width`` below about 30 is exceeded.
    """
    columns = display_columns(matrix)
    rows = list(display_rows(matrix))
    label_width = min(_MAX_LABEL, max(cell_len(name) for name in ("after", *(r[0] for r in rows))))
    headers = [_header(column) for column in columns]
    tables = []
    for block in column_blocks([cell_width for _, cell_width in headers], width - label_width - 1):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
        table.add_column("after", width=label_width)
        for header, cell_width in headers[block]:
            table.add_column(Text(header, overflow="fold"), width=cell_width, justify="right")
        for name, cells in rows:
            table.add_row(
                Text(name, overflow="fold"),
                *(
                    Text(f"{value:.1f}{_MARKS[kind]}", style=_STYLES[kind])
                    for value, kind in cells[block]
                ),
            )
        tables.append(table)
    return Group(*tables, Text(LEGEND, style="dim"))


def plain_table(first: str, *others: str, numbers: bool = True, names_wrap: bool = False) -> Table:
    """A table with a line under its titles and no other line.

    Args:
        first: title of the first column.
        others: of the columns behind it.
        numbers: those hold numbers, and stand at the right.
        names_wrap: in a narrow terminal the first column is broken into lines; else the titles of
            the other columns are, so that no number is cut.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=not names_wrap)
    for title in others:
        table.add_column(title, no_wrap=names_wrap, justify="right" if numbers else "left")
    return table


def _header(name: str) -> tuple[str, int]:
    """Return ``name`` in lines of about eight characters, and the width of its column."""
    lines = [""]
    for part in re.split(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[\s_-])", name):
        if lines[-1] and cell_len(lines[-1] + part) > _SOFT_HEADER:
            lines.append("")
        lines[-1] += part
    widest = max(cell_len(line.rstrip()) for line in lines)
    return "\n".join(line.rstrip() for line in lines), max(_MIN_CELL, min(widest, _MAX_CELL))


def column_blocks(widths: Sequence[int], room: int) -> Iterator[slice]:
    """Yield slices of the columns that fit ``room``, each column followed by one space."""
    start = used = 0
    for index, column_width in enumerate(widths):
        if index > start and used + column_width + 1 > room:
            yield slice(start, index)
            start, used = index, 0
        used += column_width + 1
    yield slice(start, len(widths))


def folded_tables(
    width: int,
    first: str,
    head: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    numbers: bool = True,
) -> Iterator[Table]:
    """Tables no wider than `width`, each with the names of all rows and some of the columns.

    A cell of words is cut into lines where it is wider than a table; a number never is.

    Args:
        first: title of the names.
        head: of the columns.
        rows: each a name and its cells.
        numbers: all columns but the last one hold numbers, and cells stand at the right.
    """
    label = min(
        max(cell_len(name) for name in (first, *(name for name, _ in rows))),
        max(_LEAST_LABEL, width // (3 if numbers else 2)),
    )
    columns = list(zip(head, *(cells for _, cells in rows), strict=True))
    # Each column takes one space more; the table adds another between two columns.
    room = width - label - 1
    most = max(room - 2, _LEAST_WORDS)
    widths = [max(map(cell_len, column)) for column in columns]
    words = slice(-1, None) if numbers else slice(None)
    widths[words] = [min(each, most) for each in widths[words]]
    for block in column_blocks([each + 1 for each in widths], room):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column(first, width=label)
        justify: Literal["right", "left"] = "right" if numbers else "left"
        for (title, *_), each in zip(columns[block], widths[block], strict=True):
            table.add_column(title, width=each, justify=justify)
        for place, (name, _) in enumerate(rows, start=1):
            shown = (Text(column[place]) for column in columns[block])
            table.add_row(Text(name, overflow="fold"), *shown)
        yield table


def metrics_table(
    matrix: AccuracyMatrix, with_head: WithHead | None = None, method: str | None = None
) -> Table:
    """Return the metrics line, in percent, and that of a model left at zero-shot to compare.

    Args:
        method: the name of that line; how many tasks were learned if it is None.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("")
    for title in TITLES.values():
        table.add_column(title, justify="right")
    for name, values in _metrics_rows(matrix, with_head, method):
        table.add_row(name, *values)
    return table


def _metrics_rows(
    matrix: AccuracyMatrix, with_head: WithHead | None, method: str | None
) -> Iterator[tuple[str, list[str]]]:
    name = str(method or counted(len(matrix.tasks), "task"))
    yield name, format_metrics(matrix.metrics())
    if with_head is not None and matrix.tasks:
        yield "with head", format_metrics(with_head.matrix.metrics())
    zero_shot = matrix.zero_shot_metrics()
    if zero_shot is not None:
        yield ZERO_SHOT, format_metrics(zero_shot)


def definition_lines() -> list[str]:
    """A line that says what each metric is, after one that says what the letters are."""
    each = [f"{title}: {DEFINITIONS[name]}" for name, title in TITLES.items()]
    return [NOTATION, *each]


def format_metrics(metrics: Metrics) -> list[str]:
    """Return the metrics in the order of ``TITLES`` with two decimals, ``-`` where undefined."""
    found = metrics.to_dict().values()
    return ["-" if value is None else f"{rounded(value):.2f}" for value in found]


def rounded(value: float) -> float:
    """A figure as tables show it, to two decimals; never a zero with a minus sign."""
    return round(value, 2) + 0.0


def class_incremental_lines(seen: ClassIncremental) -> list[str]:
    """Return average and last, and each A_i, in words; nothing where no task was learned."""
    if seen.average is None:
        return []
    after = ", ".join(f"{name} {value:.2f}" for name, value in seen.after.items())
    return [
        f"class-incremental (one head for all classes seen): average {seen.average:.2f}, "
        f"last {seen.last:.2f}",
        f"all classes seen, after {after}",
    ]


def recalls_of(
    evaluations: Sequence[Evaluation],
) -> dict[str, dict[str, dict[str, float]]]:
    """The recalls among these, by data set of captions, row of the matrix and metric."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for one in evaluations:
        if "_R@" in one.metric:
            rows = found.setdefault(one.eval_dataset, {})
            rows.setdefault(one.after_task, {})[one.metric] = one.value
    return found


def recall_lines(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the columns of captions are, and their recalls in the last row; nothing without one."""
    found = recalls_of(evaluations)
    if not found:
        return []
    lines = [recall_note(found)]
    for name, rows in found.items():
        after, recalls = list(rows.items())[-1]
        each = ", ".join(f"{m.replace('_', ' ')} {value:.2f}" for m, value in recalls.items())
        lines.append(f"{name}, after {after}: {each}")
    return lines


def measure_of(names: Iterable[str], captions: Container[str]) -> str:
    """What figures of these data sets are of, some of which have captions."""
    kinds = {"recall@1" if name in captions else "accuracy" for name in names}
    return " or ".join(sorted(kinds))


def recall_note(names: Iterable[str]) -> str:
    """What the figures of these data sets of captions are, in words."""
    return f"recall@1 of captions by images in place of accuracy: {', '.join(names)}"


def _lines_below(
    seen: ClassIncremental | None, evaluations: Sequence[Evaluation], with_head: WithHead | None
) -> list[str]:
    lines = class_incremental_lines(seen or ClassIncremental({}))
    if with_head is not None and with_head.class_incremental.average is not None:
        head = with_head.class_incremental
        lines.append(
            f"the same with class statistics: average {head.average:.2f}, last {head.last:.2f}"
        )
    return lines + recall_lines(evaluations)


def print_matrix(
    matrix: AccuracyMatrix,
    console: Console | None = None,
    seen: ClassIncremental | None = None,
    evaluations: Sequence[Evaluation] = (),
    with_head: WithHead | None = None,
    method: str | None = None,
) -> None:
    """Print the matrix and its metrics, as wide as the console is; `method` as `metrics_table`."""
    console = console or Console()
    metrics = metrics_table(matrix, with_head, method)
    console.print(matrix_table(matrix, width=console.width), "", metrics, sep="\n")
    for line in _lines_below(seen, evaluations, with_head):
        console.print(Text(line))


def summary_markdown(
    matrix: AccuracyMatrix,
    seen: ClassIncremental | None = None,
    evaluations: Sequence[Evaluation] = (),
    with_head: WithHead | None = None,
    method: str | None = None,
) -> str:
    """Return the matrix and its metrics as Markdown tables; bold is just learned."""
    body = [
        [escape(name), *(_markdown_cell(value, kind) for value, kind in cells)]
        for name, cells in display_rows(matrix)
    ]
    header = ["after", *map(escape, display_columns(matrix))]
    metrics = [[escape(name), *values] for name, values in _metrics_rows(matrix, with_head, method)]
    legend = "Accuracy in percent; **bold**: just learned, +: learned earlier, no mark: all others."
    lines = _lines_below(seen, evaluations, with_head)
    return "\n".join(
        [
            *_markdown_table(header, body),
            "",
            legend,
            "",
            *_markdown_table(["", *TITLES.values()], metrics),
            "",
            *(f"- {escape(line)}" for line in definition_lines()),
            "",
            *(f"{escape(line)}\n" for line in lines),
        ]
    )


def _markdown_table(header: list[str], body: list[list[str]]) -> Iterator[str]:
    rule = ["---", *("---:" for _ in header[1:])]
    for row in (header, rule, *body):
        yield f"| {' | '.join(row)} |"


def _markdown_cell(value: float, kind: Cell) -> str:
    text = f"{value:.2f}"
    return {"learned": f"**{text}**", "kept": f"{text}+", "other": text}[kind]


def escape(name: str) -> str:
    """A text that Markdown shows as it is, without links, tags or cells of a table in it."""
    # Underscores inside a word stay: they mean nothing there, and names are full of them.
    marked = re.sub(r"([\\|*`\[\]]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", name)
    # Not by backslashes: what does not know Markdown would still see a tag.
    return html.escape(marked, quote=False)
