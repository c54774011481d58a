"""The benchmark of micro-batches: what it counts, and that it runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import microbatch
from benchmarks.saved import SavedBytes
from mulki.errors import InputError
from tests import train_helpers

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model


def test_saved_bytes_are_those_of_the_graph_at_its_peak() -> None:
    linear = nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8)
    saved = SavedBytes([linear.weight, x])
    with saved.watching():
        for _ in range(2):
            hidden = linear(x).sigmoid()  # keeps its output, 4 x 16 floats
            loss = (hidden * hidden.detach()).sum()  # keeps both factors, one storage
            assert saved.held == 4 * 16 * 4
            loss.backward()
            del hidden, loss
            assert saved.held == 0
    assert saved.peak == 4 * 16 * 4


def test_the_command(
    start_model: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A process of its own for each point takes most of the time, and changes no column.
    monkeypatch.setattr(
        microbatch, "in_fresh_process", lambda of, point: microbatch.memory_of(of, *point)
    )
    path = tmp_path / "found.csv"
    arguments = ["--models", start_model["model"], "--micro-batch", "2", "--rounds", "1"]
    arguments += ["--factors", "1", "2", "17", "--output", str(path)]
    microbatch.main(arguments)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [(int(r["batch"]), int(r["micro_batch"])) for r in rows]
    assert sizes == [(2, 2), (4, 2), (34, 2), (4, 4)]
    saved = [float(r["saved_ratio"]) for r in rows]
    assert saved[0] == 1 and saved[2] <= 1.15 and saved[3] > 1.7
    assert rows[2]["time_ratio"] == "" and rows[1]["torch_version"] == torch.__version__
    monkeypatch.setattr(microbatch, "gradient_error", lambda workload, m: 0.1)
    with pytest.raises(InputError, match="gradients differ"):
        microbatch.main(arguments)
