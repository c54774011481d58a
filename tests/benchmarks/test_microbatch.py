"""The benchmark of micro-batches: what it counts, what it refuses, and that it runs."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.microbatch import __main__ as command
from benchmarks.microbatch import step_cost
from benchmarks.microbatch.saved import SavedBytes
from benchmarks.microbatch.workload import Batch, Setting, Workload
from mulki.errors import InputError
from tests import train_helpers

tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model


@pytest.fixture
def setting(start_model: dict[str, str]) -> Setting:
    return Setting(start_model["model"], "fp32", "cpu", 0)


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
        one = linear(x).sigmoid()
        other = linear(x).sigmoid()
        assert saved.held == 2 * 4 * 16 * 4
        del one, other
    assert saved.peak == 2 * 4 * 16 * 4


def test_memory_is_flat_in_micro_batches(setting: Setting) -> None:
    base = step_cost.memory_of(setting, 4, None)
    split = step_cost.memory_of(setting, 64, 4)
    whole = step_cost.memory_of(setting, 64, None)
    assert split["saved_mib"] <= 1.15 * base["saved_mib"]
    assert whole["saved_mib"] > 10 * base["saved_mib"]
    assert split["batch_mib"] == 16 * base["batch_mib"]
    assert split["with_batch_mib"] == pytest.approx(split["peak_mib"] + split["batch_mib"])


def test_micro_batches_are_held_against_a_batch_of_one(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_cost, "in_fresh_process", lambda of, point: {"saved_mib": point[0]})
    rows = step_cost.measure(setting, 2, (3,), rounds=1)
    assert [row["batch"] for row in rows] == [2, 6, 6]
    assert [row["saved_ratio"] for row in rows] == [1, 3, 3]


def test_a_point_in_a_fresh_process(setting: Setting) -> None:
    here, there = step_cost.memory_of(setting, 4, 2), step_cost.in_fresh_process(setting, (4, 2))
    assert there.keys() == here.keys()
    assert there["saved_mib"] == here["saved_mib"]


def test_gradients_that_differ_are_refused(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., object] = Workload.gradients

    def wrong(self: Workload, batch: Batch, micro_batch: int | None) -> object:
        return real(self, batch.head(2) if micro_batch else batch, None)

    monkeypatch.setattr(Workload, "gradients", wrong)
    with pytest.raises(InputError, match="gradients"):
        step_cost.measure(setting, 2, [1, 2], 1)


def test_the_command(
    setting: Setting,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        step_cost, "in_fresh_process", lambda setting, point: step_cost.memory_of(setting, *point)
    )
    path = tmp_path / "found.csv"
    arguments = ["--models", setting.model, "--micro-batch", "2", "--factors", "1", "2", "17"]
    command.main([*arguments, "--rounds", "1", "--output", str(path)])
    printed = capsys.readouterr().out
    assert "torch" in printed and "| peak, MiB |" in printed
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [(int(r["batch"]), int(r["micro_batch"])) for r in rows]
    assert sizes == [(2, 2), (4, 2), (34, 2), (4, 4)]
    assert float(rows[0]["time_ratio"]) == float(rows[0]["peak_ratio"]) == 1.0
    assert rows[2]["time_ratio"] == "" and rows[1]["torch_version"] == torch.__version__
