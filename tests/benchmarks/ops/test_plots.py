from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mulki.bench.cases import (
    Case,
)
from mulki.bench.report import Quantiles, Result, rows_of
from tests.benchmarks.ops.bench_helpers import MACHINE


def timed_rows() -> list[dict[str, str]]:
    rows = []
    for n in (4, 8):
        case = Case("siglip", n, n, 16, "float32")
        for name in ("eager", "mulki"):
            metrics = {
                "speed": Quantiles(2.0 * n, 1.5 * n, 3.0 * n),
                "throughput": Quantiles.same(100.0),
                "memory": Quantiles.same(0.0),
            }
            rows += rows_of(Result(case, name, "both", "timed", metrics=metrics), MACHINE)
        rows += rows_of(Result(case, "compile", "both", "failed"), MACHINE)
    return rows


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from mulki.bench.plots import plot

    (path,) = plot(timed_rows(), str(tmp_path / "figures"))
    assert path.name == "siglip_float32_both.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_figures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mulki.bench.plots import plot
    from mulki.errors import InputError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(InputError, match="matplotlib is not installed"):
        plot(timed_rows(), str(tmp_path / "figures"))
    assert not (tmp_path / "figures").exists()
