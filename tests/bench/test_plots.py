from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest

from mulki.bench.cases import Case
from mulki.bench.report import Quantiles, Result, rows_of
from mulki.errors import InputError
from tests.bench.bench_helpers import MACHINE
from tests.report.report_helpers import check_headings

TIMES = "\N{MULTIPLICATION SIGN}"


def timed_rows(**machine: str) -> list[dict[str, str]]:
    rows = []
    for n in (8, 4):
        case = Case("siglip", n, n, 16, "float32")
        for name in ("eager", "mulki"):
            metrics = {
                "speed": Quantiles(2.0 * n, 1.5 * n, 3.0 * n),
                "throughput": Quantiles.same(1500.0),
                "share_of_best_product": Quantiles.same(0.5),
                "memory": Quantiles.same(0.0),
            }
            if name == "mulki":
                metrics["speedup_over_eager"] = Quantiles(1.2, 1.1, 1.3)
            result = Result(case, name, "both", "timed", metrics=metrics)
            rows += rows_of(result, MACHINE | machine)
        rows += rows_of(Result(case, "compile", "both", "failed"), MACHINE | machine)
    return rows


def test_figures_a_page_and_their_numbers(tmp_path: Path) -> None:
    from mulki.bench.plots import plot

    older = timed_rows(torch_version="1.0")
    page, points, *drawn = plot([*older, *timed_rows()], str(tmp_path / "figures"))
    kinds = ("speed", "throughput", "share_of_best_product", "speedup_over_eager", "memory")
    assert [path.name for path in drawn] == [
        f"siglip_float32_both_{kind}.{form}" for kind in kinds for form in ("png", "svg")
    ]
    assert drawn[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = page.read_text()
    assert text.count("<svg") == 5 and "another machine or version: 18." in text
    check_headings(text)
    # Shapes from the smallest on, and ticks that are numbers.
    svg = drawn[1].read_text()
    places = [svg.index(f"{n}{TIMES}{n}{TIMES}16") for n in (4, 8)]
    assert places == sorted(places) and "10^" not in svg and "\\times" not in svg
    assert re.search(r">20</text>", svg)
    with points.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and rows[0]["throughput (GFLOP/s)"] == "1500"
    assert [row["speedup_over_eager (times)"] for row in rows] == ["", "1.2", "", "1.2"]


def test_a_gpu_has_larger_units(tmp_path: Path) -> None:
    from mulki.bench.plots import plot

    _, points, *_ = plot(timed_rows(gpu_name="a card"), str(tmp_path))
    assert "throughput (TFLOP/s)" in points.read_text() and ",1.5," in points.read_text()


def test_a_mode_that_was_not_timed(tmp_path: Path) -> None:
    from mulki.bench.plots import plot

    with pytest.raises(InputError, match="^--mode forward: "):
        plot(timed_rows(), str(tmp_path / "figures"), "forward")
    assert not (tmp_path / "figures").exists()


def test_figures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mulki.bench.plots import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(InputError, match="matplotlib"):
        plot(timed_rows(), str(tmp_path / "figures"))
    assert not (tmp_path / "figures").exists()
