from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mulki.report import print_matrix, summary_markdown
from mulki.report.tables import (
    TITLES,
    class_incremental_lines,
    escape,
    folded_tables,
    format_metrics,
    recall_lines,
)
from mulki.runs.metrics import DEFINITIONS, NOTATION, ZERO_SHOT, AccuracyMatrix, ClassIncremental
from mulki.runs.results import Evaluation
from mulki.runs.with_head import WithHead
from tests import FIXTURES
from tests.report.report_helpers import SMALL

PUBLISHED: dict[str, Any] = json.loads(
    (FIXTURES / "published_matrices.json").read_text(encoding="utf-8")
)


def published(order: str = "I") -> AccuracyMatrix:
    run = PUBLISHED["ZSCL"][order]
    names = tuple(run["datasets"])
    zero_shot = tuple(PUBLISHED["zero-shot"][order]["matrix"][0])
    return AccuracyMatrix(names, names, tuple(map(tuple, run["matrix"])), zero_shot)


def printed(matrix: AccuracyMatrix, width: int) -> list[str]:
    stream = StringIO()
    print_matrix(matrix, Console(file=stream, width=width))
    return stream.getvalue().splitlines()


def test_the_benchmark_is_one_table_of_100_columns() -> None:
    lines = printed(published(), 100)
    assert max(map(len, lines)) <= 100
    cells = [line.split() for line in lines]
    # One value per data set, in one line per row: nothing was wrapped or shortened.
    aircraft = next(line for line in cells if line[:1] == ["Aircraft"])
    assert len(aircraft) == 12
    assert aircraft[1] == "55.1*"
    last = next(line for line in cells if line[:1] == ["SUN397"])
    assert last[1] == "40.6+"
    assert last[-1] == "80.2*"
    assert ["11", "tasks", "68.14", "75.39", "83.62", "3.85", "-3.85"] in cells
    assert ["zero-shot", "69.39", "65.29", "65.29", "0.00", "0.00"] in cells


def test_learned_tasks_come_first_and_are_marked() -> None:
    cells = [line.split() for line in printed(SMALL, 100)]
    assert [ZERO_SHOT, "7.0", "4.0", "5.0"] in cells
    assert ["letters", "3.0*", "1.0", "2.0"] in cells
    assert ["digits", "6.0+", "100.0*", "50.0"] in cells
    # Square brackets in a name are not taken for rich's markup.
    assert any("[red]" in cell for line in cells for cell in line)


def test_undefined_metrics_are_dashes() -> None:
    one = AccuracyMatrix(("a", "b"), ("a",), ((1.0, 2.0),))
    assert ["1", "task", "-", "1.00", "1.00", "-", "-"] in [
        line.split() for line in printed(one, 80)
    ]
    same = AccuracyMatrix(("a", "b"), ("a", "b"), ((1.0, 2.0), (1.001, 2.0)))
    assert format_metrics(same.metrics())[-2:] == ["0.00", "0.00"]
    none = AccuracyMatrix(("a",), zero_shot=(1.0,))
    assert ["0", "tasks", "-", "-", "-", "-", "-"] in [line.split() for line in printed(none, 80)]


@settings(deadline=None)
@given(
    st.integers(1, 30),
    st.integers(40, 140),
    st.sampled_from(["set{}", "LongCamelCaseName{}", "with_underscores_{}", "x" * 40 + "{}"]),
)
def test_no_number_is_shortened_at_any_width(count: int, width: int, pattern: str) -> None:
    names = tuple(pattern.format(i) for i in range(count))
    values = tuple(100.0 - i / 10 for i in range(count))
    lines = printed(AccuracyMatrix(names, zero_shot=values), width)
    assert max(map(len, lines)) <= width
    rows = [line.split()[1:] for line in lines if line.startswith(ZERO_SHOT)]
    shown = [cell for row in rows for cell in row]
    assert shown == [f"{value:.1f}" for value in values]


def test_class_incremental_lines() -> None:
    seen = ClassIncremental({"letters": 80.0, "[red] a*b": 50.125})
    stream = StringIO()
    print_matrix(SMALL, Console(file=stream, width=120), seen)
    wanted = [
        "class-incremental (one head for all classes seen): average 65.06, last 50.12",
        "all classes seen, after letters 80.00, [red] a*b 50.12",
    ]
    assert stream.getvalue().splitlines()[-2:] == wanted
    assert summary_markdown(SMALL, seen).split("\n\n")[-2:] == [
        wanted[0], wanted[1].replace("*", "\\*").replace("[red]", "\\[red\\]") + "\n"
    ]  # fmt: skip
    assert class_incremental_lines(ClassIncremental({})) == []


def test_results_with_a_head() -> None:
    head = WithHead(SMALL, ClassIncremental({"letters": 90.0, "[red] a*b": 70.0}))
    seen = ClassIncremental({"letters": 80.0, "[red] a*b": 50.0})
    stream = StringIO()
    print_matrix(SMALL, Console(file=stream, width=120), seen, with_head=head)
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "the same with class statistics: average 80.00, last 70.00"
    (row,) = [line for line in lines if line.startswith("with head ")]
    (texts,) = [line for line in lines if line.startswith("2 tasks")]
    assert row.split()[2:] == texts.split()[2:]
    markdown = summary_markdown(SMALL, seen, with_head=head)
    assert "| with head | " in markdown and lines[-1] in markdown


def test_the_metrics_have_the_name_of_the_method_and_definitions() -> None:
    stream = StringIO()
    print_matrix(SMALL, Console(file=stream, width=120), method="mulki")
    assert any(line.startswith("mulki ") for line in stream.getvalue().splitlines())
    markdown = summary_markdown(SMALL, method="mulki")
    assert "| mulki | 1.00 | 27.50 |" in markdown
    for name, title in TITLES.items():
        assert f"- {escape(f'{title}: {DEFINITIONS[name]}')}" in markdown
    assert f"- {escape(NOTATION)}" in markdown


def test_what_markdown_would_take_for_marks_is_escaped() -> None:
    assert escape("snake_case _x_ __init__") == r"snake_case \_x\_ \_\_init\_\_"


def test_markdown() -> None:
    lines = summary_markdown(SMALL).splitlines()
    assert lines[:5] == [
        "| after | letters | digits | a\\|b &lt;i&gt;\\[red\\] |",
        "| --- | ---: | ---: | ---: |",
        "| zero-shot | 7.00 | 4.00 | 5.00 |",
        "| letters | **3.00** | 1.00 | 2.00 |",
        "| digits | 6.00+ | **100.00** | 50.00 |",
    ]
    assert "|  | Transfer | Average | Last | Forgetting | BWT |" in lines
    assert "| 2 tasks | 1.00 | 27.50 | 53.00 | -3.00 | 3.00 |" in lines
    assert "| zero-shot | 4.00 | 5.50 | 5.50 | 0.00 | 0.00 |" in lines


def recall(after: str, data_set: str, metric: str, value: float) -> Evaluation:
    return Evaluation("run", "I", 0, 0, after, data_set, metric, value, n=4, seconds=1.0)


def test_recalls_of_captions_stand_below_the_matrix() -> None:
    lines = [
        recall("zero-shot", "letters", "image_to_text_R@1", 7.0),
        recall("zero-shot", "digits", "acc1", 4.0),
        recall("digits", "letters", "image_to_text_R@1", 6.0),
        recall("digits", "letters", "text_to_image_R@5", 12.5),
    ]
    said = [
        "recall@1 of captions by images in place of accuracy: letters",
        "letters, after digits: image to text R@1 6.00, text to image R@5 12.50",
    ]
    assert recall_lines(lines) == said
    stream = StringIO()
    print_matrix(SMALL, Console(file=stream, width=120), evaluations=lines)
    assert stream.getvalue().splitlines()[-2:] == said
    assert summary_markdown(SMALL, evaluations=lines).rstrip().endswith(said[1])
    assert recall_lines(lines[1:2]) == []


@pytest.mark.parametrize("width", [40, 80])
def test_wide_tables_are_folded(width: int) -> None:
    rows = [("a", ["1.00", "x" * 30, "several words " * 6]), ("b" * 90, ["2.00", "", "no"])]
    stream = StringIO()
    for table in folded_tables(width, "row", ["figure", "letters", "words"], rows, numbers=False):
        Console(file=stream, width=10_000).print(table)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    # Nothing is lost, and each part has the names.
    assert sum(line.split()[:1] == ["a"] for line in lines) == 3
    assert stream.getvalue().count("several") == 6 and "1.00" in stream.getvalue()
