from __future__ import annotations

from pathlib import Path

import pytest

from mulki.report.comparison.compare import compare
from mulki.report.comparison.groups import TITLES, metrics_shown
from mulki.report.comparison.html import figures, render_comparison
from tests.report.report_helpers import (
    BROWSER,
    HOSTILE,
    TASKS,
    Make,
    Page,
    check_headings,
    said_in_browser,
    write_whole_run,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of two methods, the second in two forms of which one has tags in its name."""
    logs = tmp_path_factory.mktemp("logs")
    forms = [("lwf", "plain"), ("mulki", "plain"), ("mulki", HOSTILE)]
    return [
        write_whole_run(logs, name=f"{n}-{seed}", seed=seed, method=method, note=note)
        for n, (method, note) in enumerate(forms)
        for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def text(runs: list[Path]) -> str:
    return render_comparison(compare(runs))


def test_the_page_has_the_numbers_of_the_comparison(runs: list[Path], text: str) -> None:
    page = Page(text)
    assert page.open == []
    (section,) = compare(runs).to_dict()["sections"]
    last = section["groups"][0]["metrics"]["last"]
    (lwf,) = (row for row in page.rows if row[0] == "lwf" and len(row) == 9)
    assert lwf[3] == f"{last['mean']:.2f} ± {last['half_width']:.2f}" and lwf[7] == "2"
    less = section["differences"][0]["metrics"]["last"]
    shown = f"{less['value']:+.2f} [{less['low']:+.2f}, {less['high']:+.2f}]"
    (row,) = (row for row in page.rows if row[8:] == ["seeds and images"] and "plain" in row[0])
    assert row[3] == shown.replace("-", "\N{MINUS SIGN}")
    assert any(row[0] == str(runs[3]) and "weights 0123abcd" in row[4] for row in page.rows)
    for fact in ("6 runs", "3 groups", "1 order"):
        assert f'<span class="fact">{fact}</span>' in text


def test_it_needs_nothing_else_and_names_stay_text(text: str) -> None:
    check_headings(text)
    page = Page(text)
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "data")]
    assert links and all(link.startswith("#") for link in links)
    assert "default-src 'none'" in text and page.tags.count("script") == 1
    assert "<script>alert(1)" not in text and "onerror=" not in text
    assert any(row[0] == f"mulki note={HOSTILE}" for row in page.rows)
    assert len(text) < 3 * 2**20


def test_what_differs_stands_first_and_what_was_left_out_is_named(make: Make) -> None:
    good, other = make("a", "lwf"), make("b", hashes={"weights": "x"})
    damaged, part = make("c", "snd"), make("d", "wise", ends=False)
    (damaged / "matrix.csv").unlink()
    text = render_comparison(compare([good, other, damaged, part]))
    differ = text.index("These runs differ in more than the method")
    assert differ < text.index(f"start weights of {other} differ") < text.index("<table")
    notes = text.index("<h2>Notes</h2>")
    assert f"<li>{part}: left out, interrupted after 1 of 2 tasks</li>" in text[notes:]
    assert f"<li>{damaged}: left out, matrix.csv is not there" in text[notes:]


def test_a_difference_beyond_doubt_is_marked_by_its_direction(make: Make) -> None:
    runs = [make("a", "lwf"), make("b", share=0.9), make("c", "snd", share=0.1)]
    page = render_comparison(compare(runs))
    assert page.count('class="number better"') == page.count('class="number worse"') == 5


def test_columns_of_captions_are_named(make: Make) -> None:
    text = render_comparison(compare([make("x", captions=("a",), tasks=("a", "B<b>"))]))
    assert "Recall@1 of captions by images in place of accuracy: a.</p>" in text
    assert "<h3>Accuracy or recall@1 of each task</h3>" in text
    plain = render_comparison(compare([make("y")]))
    assert "ecall@1" not in plain and "<h3>Accuracy of each task</h3>" in plain


def test_orders_have_a_table_of_their_own(make: Make) -> None:
    turned = {"tasks": ("b", "a")}
    runs = [make("a", "lwf"), make("b"), make("c", "lwf", **turned), make("d", **turned)]
    found = compare(runs)
    text = render_comparison(found)
    rows = Page(text).rows
    assert any(row[0] == "mulki less lwf" and row[-1] == "2" for row in rows)
    names = [plot.name for plot in figures(found)]
    assert len(names) == len(set(names)) == text.count("<svg")


def test_a_page_of_one_run_has_no_differences(make: Make) -> None:
    text = render_comparison(compare([make("a")]))
    assert "differ in more" not in text and "Notes" not in text and "Less " not in text


ASK = """
const tabs = [...document.querySelectorAll("[role=tablist]")][0].children;
const panels = [...document.querySelectorAll(".tabs")][0].querySelectorAll("[role=tabpanel]");
said.tabs = [...tabs].map((tab) => tab.textContent);
tabs[0].dispatchEvent(new KeyboardEvent("keydown", {key: "End", bubbles: true}));
tabs[0].focus();
tabs[0].dispatchEvent(new KeyboardEvent("keydown", {key: "End", bubbles: true}));
said.shown = [...panels].map((panel) => panel.getBoundingClientRect().height > 0);
const table = document.querySelector("table.sortable");
table.querySelectorAll("th button")[3].click();
said.last = [...table.tBodies[0].rows].map((row) => parseFloat(row.cells[3].textContent));
said.figures = [...document.querySelectorAll("figure svg")].filter(
  (svg) => svg.getBoundingClientRect().height > 100).length;
said.wide = document.documentElement.scrollWidth > innerWidth;
const outer = table.closest(".scroll");
outer.scrollLeft = 1e6;
const cells = table.tHead.rows[0].cells;
said.reach = cells[cells.length - 1].getBoundingClientRect().right <= innerWidth + 1;
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1400, 500])
def test_in_a_browser(text: str, tmp_path: Path, width: int) -> None:
    said = said_in_browser(text, ASK, tmp_path, width)
    assert said["errors"] == 0 and not said["wide"] and said["reach"]
    assert said["tabs"] == [*TASKS] and said["shown"] == [False, False, True]
    assert said["last"] == sorted(said["last"])
    # Those over all tasks, and one in each row of tabs.
    assert said["figures"] == text.count("<figure") - (len(TASKS) - 1) - 2


def test_runs_with_a_head_have_columns_for_it(tmp_path: Path) -> None:
    runs = [
        write_whole_run(tmp_path, name=method, method=method, head=method == "mulki")
        for method in ("lwf", "mulki")
    ]
    found = compare(runs)
    assert metrics_shown(found.sections) == list(TITLES)
    page = Page(render_comparison(found))
    rows = [row for row in page.rows if len(row) == len(TITLES) + 3]
    mulki, lwf = (next(row for row in rows if row[0] == name) for name in ("mulki", "lwf"))
    assert mulki[list(TITLES).index("head_last") + 1] == "100.00"
    assert lwf[list(TITLES).index("head_last") + 1] == "-"
    assert "with the head of class statistics" in render_comparison(found)
