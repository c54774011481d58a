from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mulki.metrics import DEFINITIONS, ZERO_SHOT, AccuracyMatrix, write_matrix
from mulki.report import read_folder, render_html, write_report


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
    assert {value: float(heat) for heat, value in cells} == {
        value: pytest.approx(float(value) * 0.007, abs=5e-4) for _, value in cells
    }


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = render_html(read_folder(folder))
    assert not {name for name, _ in Page(text).attributes} & {"src", "href", "data", "action"}
    for external in ("http:", "https:", "//", "url(", "@import", "<script", "<link", "<i>"):
        assert external not in text


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
