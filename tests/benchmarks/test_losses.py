"""`python -m benchmarks.losses` on a batch that takes no time."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.losses import __main__ as benchmark
from benchmarks.losses import fit
from benchmarks.losses.train import LOSSES, train
from mulki.losses import ClipLoss


def test_the_table_and_a_training(monkeypatch, capsys):
    arguments = "--batch-sizes 16 --width 8 --seconds 0 --train-batch-size 0 --threads 1"
    monkeypatch.setattr(sys, "argv", ["benchmarks.losses", *arguments.split()])
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    rows = [
        line.split(" | ") for line in out.splitlines() if line.startswith("| ") and "16" in line
    ]
    assert [row[0].removeprefix("| ") for row in rows] == list(LOSSES["mulki"])
    assert "torch" in out and "open_clip" in out
    assert [row.count("-") for row in rows] == [0, 0, 0, 4]  # open_clip has no second teacher


def test_a_wrong_loss_is_not_measured(monkeypatch):
    class Half(ClipLoss):
        def forward(self, *args, **kwargs):
            return {name: v / 2 for name, v in super().forward(*args, **kwargs).items()}

    monkeypatch.setitem(LOSSES["mulki"], "ClipLoss", Half)
    with pytest.raises(SystemExit, match="ClipLoss at B = 16: error"):
        benchmark.check("ClipLoss", 16, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("name", LOSSES["open_clip"])
def test_training_goes_the_same_way_with_both(name):
    ours, theirs = (train(name, who, batch_size=24, steps=3) for who in ("mulki", "open_clip"))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert ours["losses"][-1] < ours["losses"][0] and ours["peak"] >= ours["before"] > 0


def test_the_largest_batch_is_found(monkeypatch):
    """By a memory that grows as B and as B squared."""
    monkeypatch.setattr(
        fit, "memory", lambda who, name, n, width: n / 64 if who == "linear" else n * n / 2**20
    )
    assert fit.largest("linear", "ClipLoss", 8, 64.0, 8192) == "4096"
    assert fit.largest("square", "ClipLoss", 8, 64.0, 32768) == "8192"
    assert fit.largest("linear", "ClipLoss", 8, 1e6, 2048) == "over 2048"
    assert fit.largest("square", "ClipLoss", 8, 0.0, 2048) == "0"


def test_a_table_of_backends():
    rows = list(fit.table("DistillClipLoss", [16], 8, 0.0, 1e6, 512))
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {who}" for who in fit.WHO]
    assert all(row.endswith("| over 512 |") for row in rows[2:])
