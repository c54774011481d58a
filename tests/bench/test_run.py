"""The command: its arguments, tables and CSV."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from mulki.app.cli import run_command
from mulki.bench import call_cost
from mulki.bench.cases import (
    MODES,
    OPERATORS,
    Case,
)
from mulki.bench.pace import Pace
from mulki.bench.providers import PROVIDERS
from mulki.bench.report import Result, read_rows
from mulki.bench.run import BenchOptions, print_wrapped, run
from tests import ROOT
from tests.bench.bench_helpers import LIGER_COLUMNS, wrong_provider

TINY = ["--shapes", "5x5x8", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = call_cost.ProductRates(torch_mm=1e9, similarity=4e9)
    monkeypatch.setattr(call_cost, "product_rate", lambda dtype, device: rates)
    monkeypatch.setattr(call_cost, "copy_rate", lambda device: 2e9)


def bench(*arguments: str) -> int:
    return run_command(["bench", *arguments])


def test_a_run_prints_tables_and_writes_a_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ops.csv"
    providers = ("eager", "torch_lce-chunks", "mulki", "mulki-reference")
    arguments = (*TINY, "--dtypes", "fp32", "bfloat16", "--threads", "1", "--providers", *providers)
    before = torch.get_num_threads()
    assert bench(*arguments, "--output", str(path)) == 0
    assert torch.get_num_threads() == before
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert f"torch {torch.__version__}" in words
    assert "dual_teacher_kl, 5x5x8, bfloat16 (4 of 16, about " in words
    assert max(map(len, out.splitlines())) <= 80
    # The table at the end has a line for each operator.
    end = out[out.index("eager's time over mulki's") :].splitlines()
    assert [line.split()[0] for line in end[2:]] == [*OPERATORS]
    assert "torch_lce-chunks: not applicable: has cross-entropy to labels alone" in out

    assert path.read_text().splitlines()[0].startswith(LIGER_COLUMNS)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = {(r["kernel_name"], r["kernel_provider"], r["kernel_operation_mode"]) for r in rows}
    assert points == {(o, p, m) for o in OPERATORS for p in providers for m in MODES}
    for row in rows:
        assert row["threads"] == "1" and row["torch_version"] == torch.__version__
        assert row["cpu_name"] and row["capability"] and row["x_name"] == "N"
        if row["status"] == "not applicable":
            assert row["y_value_50"] == "" and "cross-entropy" in row["note"]
            assert row["kernel_provider"] == "torch_lce-chunks"
            continue
        assert row["status"] == "timed"
        low, median, high = (float(row[f"y_value_{q}"]) for q in (20, 50, 80))
        assert 0 <= low <= median <= high
        config = json.loads(row["extra_benchmark_config_str"])
        assert config["rounds"] >= 5 and (config["P"], config["D"]) == (5, 8)
        assert row["x_value"] == "5" and config["dtype"] in ("float32", "bfloat16")
    metrics = {r["metric_name"]: r["metric_unit"] for r in rows}
    assert metrics["speed"] == "ms" and metrics["memory"] == "MiB"
    assert metrics["throughput"] == "GFLOP/s" and "share_of_torch_mm" in metrics
    rate, of_mm, of_best = (
        [float(r["y_value_50"]) for r in rows if r["metric_name"] == name]
        for name in ("throughput", "share_of_torch_mm", "share_of_best_product")
    )
    # The products run at 1 and 4 GFLOP/s.
    assert of_mm == pytest.approx(rate, rel=1e-4)
    assert [4 * share for share in of_best] == pytest.approx(rate, rel=1e-4)
    config = json.loads(rows[0]["extra_benchmark_config_str"])
    of_copy = next(r for r in rows if r["metric_name"] == "share_of_copy")
    intensity = config["least_operations"] / config["least_bytes"]
    assert float(of_copy["y_value_50"]) == pytest.approx(rate[0] / intensity / 2, rel=1e-4)
    ratios = {r["kernel_provider"] for r in rows if r["metric_name"] == "speedup_over_eager"}
    assert ratios == {"torch_lce-chunks", "mulki", "mulki-reference"}
    # Gradients that exist after the forward pass give the backward pass alone no rate or ratio.
    alone = {
        r["kernel_provider"]: {s["metric_name"] for s in rows if same_point(s, r)}
        for r in rows
        if (r["kernel_name"], r["kernel_operation_mode"]) == ("dual_teacher_kl", "backward")
    }
    assert "throughput" in alone["eager"]
    assert alone["mulki"] == {"speed", "gradient_error"}


def same_point(one: dict[str, str], other: dict[str, str]) -> bool:
    keys = ("kernel_name", "kernel_provider", "kernel_operation_mode")
    return all(one[key] == other[key] for key in keys)


def test_output_grows_and_the_table_shows_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "ops.csv")
    given = (*TINY, "--ops", "siglip", "--dtypes", "fp32", "--modes", "both", "--output", path)
    assert bench(*given, "--providers", "eager", "mulki") == 0
    first = len(read_rows(path))
    monkeypatch.setitem(PROVIDERS, "mulki", wrong_provider())
    monkeypatch.setattr("mulki.bench.machine.datetime", Later)
    assert bench(*given, "--providers", "eager", "mulki") == 1
    assert len(read_rows(path)) > first
    capsys.readouterr()
    assert bench("table", path) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 3 and "threads: " in lines[0]
    assert "eager, ms | mulki, ms" in table[0]
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:4] == ["siglip", "5 x 5 x 8", "float32", "both"]
    # The failure was last, so nothing of the earlier success is left.
    assert cells[5:9] == ["failed", "-", "-", "-"] and float(cells[4]) > 0


def test_shapes_that_are_no_pairs_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--ops", "similarity", "siglip", "--dtypes", "fp32", "--modes", "forward")
    shapes = ("--shapes", "6x5x8", "5x5x8", "--seconds", "0.001")
    assert bench(*given, *shapes, "--providers", "eager") == 0
    out = capsys.readouterr().out
    assert "siglip take N = P, so these shapes are left out: 6x5x8" in out
    assert "siglip, 5x5x8" in out and "siglip, 6x5x8" not in out


class Later:
    @staticmethod
    def now() -> Later:
        return Later()

    def isoformat(self, timespec: str) -> str:
        return "9999-01-01T00:00:00"


def test_the_module_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.ops", "--ops", "gone"])
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(SystemExit) as leave:
        runpy.run_module("benchmarks.ops", run_name="__main__")
    assert leave.value.code == 2 and "--ops: got gone" in capsys.readouterr().err


def test_a_run_says_which_points_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = call_cost.ProductRates(torch_mm=1e9, similarity=1e9)
    monkeypatch.setattr(call_cost, "product_rate", lambda dtype, device: rates)
    monkeypatch.setattr(call_cost, "copy_rate", lambda device: 1e9)
    said: list[str] = []
    options = BenchOptions(
        ops=("siglip", "similarity"),
        shapes=("3x3x4", "2x2x4"),
        dtypes=("fp32",),
        modes=("forward",),
        providers=("eager",),
        seconds=0.001,
        budget=1e-9,
    )
    assert run(options, said.append) == 0
    # One at least, and the rest shape by shape.
    assert any(line.startswith("\nsiglip, 3x3x4") for line in said)
    assert said[-1] == (
        "left out: 3 points, beyond --budget 1e-09: "
        "similarity 3x3x4 float32; siglip 2x2x4 float32; similarity 2x2x4 float32"
    )


def test_quick_takes_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that measuring moves; checks and memory take nearly as long as timing."""
    clock: list[float] = [0.0]
    cases: list[Case] = []
    monkeypatch.setattr("mulki.bench.run.Pace", partial(Pace, now=lambda: clock[0]))

    more = [0.0]

    def measured(
        case: Case, providers: Sequence[str], modes: Sequence[str], seconds: float
    ) -> list[Result]:
        assert "compile" not in providers and "mulki" in providers
        clock[0] += 1.9 * len(providers) * len(modes) * seconds + more[0]
        cases.append(case)
        return []

    monkeypatch.setattr("mulki.bench.run.measure_case", measured)
    said: list[str] = []
    assert run(BenchOptions(quick=True), said.append) == 0
    assert 40 < clock[0] < 60 and len(cases) == 26 and not any("left out: 2" in s for s in said)
    # Every operator comes before a second shape of one.
    assert {case.operator for case in cases[:16]} == {*OPERATORS}
    # On a machine that is much slower, what does not fit is left out and named.
    clock[0] = 0.0
    cases.clear()
    more[0] = 8.0
    assert run(BenchOptions(quick=True), said.append) == 0
    assert clock[0] < 60 and "points, beyond --budget 45: " in said[-1]


def test_long_lines_are_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    print_wrapped("\nshort")
    print_wrapped("word " * 40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "short"] and max(map(len, lines)) <= 80
    assert len(lines) > 4 and all(line.startswith("  word") for line in lines[3:])
