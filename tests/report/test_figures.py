from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mulki.metrics import AccuracyMatrix, ClassIncremental
from mulki.report import read_contents
from mulki.report.figures import plots, thinned
from tests.report.report_helpers import HOSTILE, record

ALL = {
    "accuracy",
    "forgetting",
    "class_incremental",
    "losses",
    "teacher_weights",
    "teacher_samples",
    "prototype_drift",
    "step_time",
    "speed",
    "memory",
}


def test_figures_on_the_page(whole: Path) -> None:
    ids: list[str] = []
    found = plots(read_contents(whole))
    assert {plot.name for plot in found} == ALL
    for plot in found:
        svg = plot.svg()
        root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
        assert root.tag == "svg" and root.attrib["viewBox"] and "width" not in root.attrib
        assert root.attrib["aria-hidden"] == "true" and plot.title and plot.text.endswith(".")
        own = re.findall(r'\bid="([^"]*)"', svg)
        assert len(own) == len(set(own))
        for used in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg):
            assert "".join(used) in own
        ids += own
        assert "currentColor" in svg and "#0102" not in svg and "http" not in svg
        assert "<script" not in svg
    assert len(ids) == len(set(ids))


def test_names_stay_text(whole: Path) -> None:
    (accuracy,) = (p for p in plots(read_contents(whole)) if p.name == "accuracy")
    root = ElementTree.fromstring(accuracy.svg().replace("xlink:href", "href"))
    texts = ["".join(each.itertext()) for each in root.iter("text")]
    assert HOSTILE in texts  # in the legend: with its dollar signs, and no formula


def test_files(whole: Path, tmp_path: Path) -> None:
    (forgetting,) = (p for p in plots(read_contents(whole)) if p.name == "forgetting")
    png, svg = forgetting.write(tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG") and png.name == "forgetting.png"
    text = svg.read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "#222222" in text and "#0102" not in text


def test_figures_of_what_there_is(whole: Path) -> None:
    contents = read_contents(whole)
    nothing = replace(
        contents.data, matrix=AccuracyMatrix(()), class_incremental=ClassIncremental({})
    )
    assert plots(replace(contents, history=[], data=nothing)) == []
    few = [replace(r, teacher_weights={}, prototype_drift={}, memory_mib=None, seconds={})
           for r in contents.history]  # fmt: skip
    names = {plot.name for plot in plots(replace(contents, history=few))}
    assert names == {"accuracy", "forgetting", "class_incremental", "losses", "speed"}
    one = plots(replace(contents, history=contents.history[:1]))
    assert {plot.name for plot in one} == {"accuracy", "forgetting", "class_incremental"}


@pytest.mark.parametrize("count", [5, 400, 5000])
def test_long_histories_are_thinned(count: int) -> None:
    history = [record(f"t{index}", index, step, count) for index in range(3)
               for step in range(1, count + 1)]  # fmt: skip
    found = thinned(history)
    assert len(found) <= 420
    for index in range(3):
        steps = [r.step for r in found if r.index == index]
        assert steps[0] == 1 and steps[-1] == count and steps == sorted(set(steps))
