from __future__ import annotations

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from mulki.report.comparison.compare import compare
from mulki.report.comparison.groups import TITLES, Against, Comparison, Section
from mulki.report.comparison.tables import (
    WIDTH,
    Cell,
    difference_rows,
    mean_rows,
    print_comparison,
)
from mulki.runs.intervals import Difference
from mulki.runs.metrics import HEAD_METRICS
from tests.report.report_helpers import Make


def difference(of: Difference, name: str = "last") -> Cell:
    section = Section("one", ("a",), (), "base", (Against("ours", 1, "seeds", {name: of}),))
    (row,) = difference_rows(section, list(TITLES))
    assert sum(str(cell) != "-" for cell in row.cells) == 1
    return row.cells[list(TITLES).index(name)]


def test_differences_have_their_intervals_where_there_are_some() -> None:
    assert str(difference(Difference(-1.0, None, None))) == "-1.00"
    assert str(difference(Difference(-0.001, -0.2, 0.004))) == "+0.00 [-0.20, +0.00]"
    cell = difference(Difference(2.0, -0.5, 4.5))
    assert str(cell) == "+2.00 [-0.50, +4.50]" and cell.kind == ""
    assert difference(Difference(2.0, 0.5, 4.5)).kind == "better"
    assert difference(Difference(2.0, 0.5, 4.5), "forgetting").kind == "worse"
    assert difference(Difference(-2.0, -4.5, -0.5)).kind == "worse"


def shown(comparison: Comparison, width: int | None, **console: Any) -> list[str]:
    stream = io.StringIO()
    print_comparison(comparison, Console(file=stream, **console), width)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.fixture
def several(make: Make) -> Comparison:
    """Two methods in two forms and two orders, one with a long name and what it uses."""
    uses = ("class names of earlier tasks", "a vocabulary of words")
    forms: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("lwf", (), {}),
        ("mulki", (), {"gate": "label"}),
        ("mulki", uses, {"gate": "confidence", "learning_rate": 0.00125}),
    ]
    return compare(
        [
            make(f"{form}-{order}-{seed}", name, seed, tasks=tasks, uses=uses, **options)
            for order, tasks in enumerate((("a", "b"), ("b", "a")))
            for seed in (0, 1)
            for form, (name, uses, options) in enumerate(forms)
        ]
    )


def numbers(comparison: Comparison) -> set[str]:
    section = comparison.sections[0]
    rows = [*mean_rows(section, list(TITLES)), *difference_rows(section, list(TITLES))]
    return {str(cell) for row in rows for cell in row.cells}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_columns_that_do_not_fit_follow_below(several: Comparison, width: int) -> None:
    lines = shown(several, width)
    assert max(map(cell_len, lines)) <= width and "…" not in "".join(lines)
    text = "\n".join(lines)
    assert all(number in text for number in numbers(several))
    # Each part has the names of its rows, and each column is there once.
    (first, last) = (lines.index(line) for line in ("zoo, order I", "less lwf"))
    part = lines[first:last]
    heads = [line for line in part if any(title in line for title in TITLES.values())]
    assert len(heads) > 1 or width == 120
    assert sum(line.startswith("lwf") for line in part) == len(heads) + ("uses" not in heads[-1])
    for name, title in TITLES.items():
        assert sum(title in line for line in heads) == (name not in HEAD_METRICS)
    assert " ".join("".join(part).split()).count("vocabulary of words") == 1


def test_a_wide_terminal_has_all_columns_beside_each_other(several: Comparison) -> None:
    lines = shown(several, 250)
    (head,) = [line for line in lines[: lines.index("less lwf")] if "Transfer" in line]
    assert head.split()[-2:] == ["runs", "uses"] and "CIL last" in head


def test_the_width_is_that_of_the_terminal_and_one_of_its_own_without(
    several: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERM", "xterm")
    assert shown(several, None) == shown(several, WIDTH)
    assert shown(several, None, force_terminal=True) == shown(several, 250)


def test_no_number_is_cut_in_a_narrow_terminal(several: Comparison) -> None:
    text = "\n".join(shown(several, 20))
    assert "…" not in text and all(number in text for number in numbers(several))


def test_columns_of_captions_are_named(make: Make) -> None:
    mixed = compare([make("x", "lwf", captions=("a",)), make("y", captions=("a",))])
    assert mixed.sections[0].captions == ("a",)
    note = "recall@1 of captions by images in place of accuracy: a"
    assert shown(mixed, 80).count(note) == 1
    assert not any("recall@1" in line for line in shown(compare([make("z")]), 80))
