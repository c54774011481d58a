from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from mulki.report.plot import DIM, TEXT, Plot
from tests.report.report_helpers import HOSTILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

pytestmark = pytest.mark.drawn


def draw(axes: Axes) -> int:
    axes.plot([1, 2], [3, 1], color=TEXT, label=HOSTILE)
    axes.axhline(2, color=DIM)
    return 1


PLOT = Plot("of_two", "Two points", "Two points.", draw)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("xlink:href", "href"))


def test_a_figure_on_a_page_has_the_colours_of_the_page_and_names_of_its_own() -> None:
    svg = PLOT.svg()
    root = parsed(svg)
    assert root.tag == "svg" and root.attrib["viewBox"] and "width" not in root.attrib
    assert root.attrib["aria-hidden"] == "true"
    assert "currentColor" in svg and "#0102" not in svg and "http" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) and all(each.startswith("of_two-") for each in ids)
    used = ["".join(pair) for pair in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)]
    assert used and set(used) <= set(ids)


def test_names_stay_text() -> None:
    texts = ["".join(each.itertext()) for each in parsed(PLOT.svg()).iter("text")]
    assert HOSTILE in texts  # with its dollar signs, and no formula


def test_files(tmp_path: Path) -> None:
    png, svg = PLOT.write(tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG") and png.name == "of_two.png"
    text = svg.read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "#222222" in text and "#777777" in text and "#0102" not in text


def test_a_figure_is_the_same_each_time() -> None:
    assert PLOT.svg() == PLOT.svg()
