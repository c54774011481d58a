from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mulki.errors import InputError
from mulki.metrics import DEFINITIONS, ZERO_SHOT, AccuracyMatrix, write_matrix
from mulki.report import (
    print_matrix,
    read_folder,
    render_html,
    summary_markdown,
    write_report,
)
from mulki.results import RunFolder

PUBLISHED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "published_matrices.json").read_text(encoding="utf-8")
)


def published(order: str = "I") -> AccuracyMatrix:
    run = PUBLISHED["ZSCL"][order]
    names = tuple(run["datasets"])
    zero_shot = tuple(PUBLISHED["zero-shot"][order]["matrix"][0])
    return AccuracyMatrix(names, names, tuple(map(tuple, run["matrix"])), zero_shot)


# Columns are neither in the order learned nor all learned, and one name is hostile.
SMALL = AccuracyMatrix(
    columns=("digits", "a|b <i>[red]", "letters"),
    tasks=("letters", "digits"),
    rows=((1.0, 2.0, 3.0), (100.0, 50.0, 6.0)),
    zero_shot=(4.0, 5.0, 7.0),
)


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


def test_markdown() -> None:
    lines = summary_markdown(SMALL).splitlines()
    assert lines[:5] == [
        "| after | letters | digits | a\\|b \\<i\\>\\[red\\] |",
        "| --- | ---: | ---: | ---: |",
        "| zero-shot | 7.00 | 4.00 | 5.00 |",
        "| letters | **3.00** | 1.00 | 2.00 |",
        "| digits | 6.00+ | **100.00** | 50.00 |",
    ]
    assert "|  | Transfer | Average | Last | Forgetting | BWT |" in lines
    assert "| 2 tasks | 1.00 | 27.50 | 53.00 | -3.00 | 3.00 |" in lines
    assert "| zero-shot | 4.00 | 5.50 | 5.50 | 0.00 | 0.00 |" in lines


class Page(HTMLParser):
    """The text of each table cell, the attributes seen, and whether all tags were closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = RunFolder.create(
        tmp_path,
        "first",
        method="mulki",
        order="II",
        seed=4,
        columns=SMALL.columns,
        config={"prompt": "a photo of a <b>{}</b>"},
        hashes={"weights": "0123abcd", "splits": {"digits": "4567"}, "prompts": None},
    )
    for name, n in zip(SMALL.columns, (300, 400, 500), strict=True):
        run.record(after_task=ZERO_SHOT, eval_dataset=name, value=1.0, n=n, seconds=1.0, step=0)
    for after, row in [
        (ZERO_SHOT, SMALL.zero_shot or ()),
        *zip(SMALL.tasks, SMALL.rows, strict=True),
    ]:
        run.add_row(after, dict(zip(SMALL.columns, row, strict=True)))
    run.finish()
    return run.path


def test_the_page_holds_matrix_metrics_configuration_and_environment(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert ["after", "letters", "digits", "a|b <i>[red]"] in page.rows
    assert [ZERO_SHOT, "7.0", "4.0", "5.0"] in page.rows
    assert ["letters", "3.0", "1.0", "2.0"] in page.rows
    assert ["digits", "6.0", "100.0", "50.0"] in page.rows
    assert ["test images", "500", "300", "400"] in page.rows
    assert ["Transfer", "1.00", "4.00", DEFINITIONS["transfer"]] in page.rows
    assert ["BWT", "3.00", "0.00", DEFINITIONS["bwt"]] in page.rows
    assert ["hashes: weights", "0123abcd"] in page.rows
    assert ["hashes: splits: digits", "4567"] in page.rows
    assert ["hashes: prompts", "-"] in page.rows
    assert "<strong>complete</strong>; method mulki, order II, seed 4" in text
    assert "a photo of a &lt;b&gt;{}&lt;/b&gt;" in text
    assert ("class", "number learned") in page.attributes
    assert text.count('"number learned"') == 2
    assert text.count('"number kept"') == 1


def test_heat_follows_the_accuracy(folder: Path) -> None:
    page = render_html(read_folder(folder))
    cells = re.findall(r"rgba\(31, 119, 180, ([\d.]+)\)\">([\d.]+)<", page)
    assert len(cells) == 9
    assert dict((value, float(heat)) for heat, value in cells) == {
        value: pytest.approx(float(value) * 0.007, abs=5e-4) for _, value in cells
    }


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = render_html(read_folder(folder))
    assert not {name for name, _ in Page(text).attributes} & {"src", "href", "data", "action"}
    for external in ("http:", "https:", "//", "url(", "@import", "<script", "<link", "<i>"):
        assert external not in text


def test_the_page_reads_the_run_folder_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    assert write_report(moved) == moved / "report.html"
    assert (moved / "report.html").read_text() == render_html(read_folder(moved))
    assert "<title>first</title>" in render_html(read_folder(moved))


def test_the_summary_holds_name_status_and_matrix(folder: Path) -> None:
    write_report(folder)
    text = (folder / "summary.md").read_text()
    assert text.startswith("# first\n\nStatus: complete\n\n")
    assert summary_markdown(read_folder(folder).matrix) in text


def test_a_bare_matrix_has_a_page(tmp_path: Path) -> None:
    write_matrix(tmp_path / "matrix.csv", AccuracyMatrix(("a",), ("a",), ((12.5,),)))
    page = render_html(read_folder(tmp_path))
    rows = Page(page).rows
    assert ["a", "12.5"] in rows
    assert ["Average", "12.50", DEFINITIONS["average"]] in rows
    assert f"<title>{tmp_path.name}</title>" in page
    assert "<strong>unknown</strong>" in page
    assert "Configuration" not in page
    assert "Environment" not in page


@pytest.mark.parametrize("name", ["summary.json", "env.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_files_are_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(name)):
        render_html(read_folder(folder))


def test_a_folder_without_a_matrix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no matrix\.csv in it"):
        write_report(tmp_path)
    with pytest.raises(InputError, match=r"no matrix\.csv in it"):
        write_report(tmp_path / "missing")
    assert not list(tmp_path.iterdir())
