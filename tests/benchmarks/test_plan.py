"""The counts of products, launches and memory: as committed, and what they may be."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("triton", reason="needs Triton, which this installation has not")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("launches are recorded where nothing is interpreted", allow_module_level=True)

import torch

from benchmarks.kernels import plan
from benchmarks.kernels.cards import BANDWIDTH, CARDS, LAUNCH, RATE, seconds
from benchmarks.kernels.counts import OPERATORS, Work, counts_of_torch
from mulki.kernels.ahead_of_time import NUMBER_FORMATS

RENEW = "run python -m benchmarks.kernels plan --write"


@pytest.fixture(scope="module")
def table():
    return plan.read()


def test_the_table_has_every_line(table):
    lines = {tuple(row[name] for name in plan.COLUMNS[:6]) for row in table}
    assert len(lines) == len(table)
    shapes = len(plan.SHAPES) * (len(OPERATORS) - 1) + sum(n == p for n, p in plan.SHAPES)
    assert len(table) == shapes * len(plan.WIDTHS) * len(NUMBER_FORMATS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_table_has_todays_counts(operator, table):
    chosen = [
        row
        for row in table
        if row["operator"] == operator and int(row["n"]) <= 16384 and row["d"] in ("512", "1280")
    ][::7]
    for row in chosen:
        shape = (int(row[name]) for name in ("n", "p", "d"))
        today = plan.row(operator, *shape, row["numbers"])
        assert plan.cells(today) == list(row.values()), RENEW


def test_an_operation_of_torch_counts_once_with_its_bytes_and_its_memory():
    a, b = (torch.empty(8, 8, device="meta") for _ in range(2))
    found = counts_of_torch(lambda: [(a @ b).exp() + 1], 2 * 8**3)
    assert [one.source for one in found.work] == ["library", "torch", "torch"]
    assert found.products == 1 and found.bytes == 256 * (3 + 2 + 2)
    assert found.extra_bytes == 256  # two of the three results at a time, one of them the last


def test_a_launch_takes_the_longest_of_products_bytes_and_host():
    card = CARDS["H100"]
    work = [Work("library", 1e12, 0), Work("kernel", 0, 10**9), Work("torch", 1, 1)]
    wanted = 1e12 / (RATE["library"] * card.half) + 1e9 / (BANDWIDTH * card.bandwidth) + LAUNCH
    assert seconds(work, card, "bf16") == pytest.approx(wanted)
    strict = [seconds([Work(one, 1e12, 0)], card, "fp32") for one in ("library", "kernel")]
    assert strict[1] < strict[0]  # three products of tf32


def test_what_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(plan, "SHAPES", ((64, 100),))
    monkeypatch.setattr(plan, "WIDTHS", (512,))
    assert plan.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == (len(OPERATORS) - 1) * len(NUMBER_FORMATS)
    assert set(rows[0]) == {*plan.COLUMNS, "seconds"} and set(rows[0]["seconds"]) == set(CARDS)
    assert plan.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
