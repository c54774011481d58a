"""`python -m benchmarks.losses` and `.fit` on batches that take no time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.losses import __main__ as benchmark
from benchmarks.losses import fit
from mulki.losses import ClipLoss

SMALL = "--batch-sizes 16 --width 8 --seconds 0 --threads 1".split()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_each_loss_and_weight_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main([*SMALL, "--weights", "1", "2"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| 16 |" in line]
    assert [(row[0].removeprefix("| "), row[1]) for row in rows] == [
        ("ClipLoss", "-"),
        ("SigLipLoss", "-"),
        ("DistillClipLoss", "1"),
        ("DistillClipLoss", "2"),
        ("DualTeacherClipLoss", "1"),
        ("DualTeacherClipLoss", "2"),
    ]


def test_a_wrong_loss_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(ClipLoss):
        def forward(self, *args, **kwargs):
            return {name: v / 2 for name, v in super().forward(*args, **kwargs).items()}

    monkeypatch.setitem(benchmark.LOSSES["mulki"], "ClipLoss", Half)
    with pytest.raises(SystemExit, match="ClipLoss at B = 16: error"):
        benchmark.main(SMALL)


def test_the_largest_batch_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a memory that grows as B² with open_clip's and as B with ours."""
    monkeypatch.setattr(
        fit, "memory", lambda who, name, n, width: n * n / 2**20 if who == "open_clip" else n / 64
    )
    fit.main([*SMALL, "--mib", "64", "--limit", "16384"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "MiB |" in line]
    assert [row.split(" | ")[-1] for row in rows] == ["8192 |", "4096 |", "4096 |"]
