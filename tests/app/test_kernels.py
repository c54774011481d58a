"""What `mulki doctor --kernels` makes of its measurements; it runs in tests/kernels."""

from __future__ import annotations

import pytest
import torch

from mulki.app import kernels
from mulki.app.cli import run_command
from mulki.app.kernels import Measured, verdict
from mulki.bench import cases
from mulki.ops.operators import OPERATORS


def measured(logits: int, triton: float, problem: str | None = None) -> Measured:
    times = {"triton": triton, "chunked": 1.0}
    return Measured("siglip", "float32", f"{logits}x1x8", logits, 0.0, times, problem)


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ((0.5, 0.5, 0.5), 10),
        ((2.0, 0.5, 0.5), 100),
        ((0.5, 2.0, 0.5), 1000),
        ((0.5, 0.5, 2.0), "is slower at 1000x1x8"),
    ],
)
def test_it_serves_from_the_size_on_beyond_which_it_always_wins(
    times: tuple[float, ...], wanted: int | str
) -> None:
    rows = [measured(*one) for one in zip((10, 100, 1000), times, strict=True)]
    assert verdict(rows) == verdict(rows[::-1]) == wanted


def test_what_is_wrong_at_one_shape_serves_nowhere() -> None:
    found = verdict([measured(10, 0.5), measured(100, 0.5, "loss: off"), measured(1000, 0.5)])
    assert isinstance(found, str) and "100x1x8 (loss: off)" in found


def test_where_nothing_else_has_the_memory_it_wins() -> None:
    assert verdict([Measured("siglip", "float32", "9x9x9", 81, 0.0, {"triton": 9.0})]) == 81


def test_each_operator_has_a_case_of_the_benchmark_at_three_shapes() -> None:
    tried = [(op, shape) for op, dtype, shape, _ in kernels._cases("cuda") if dtype == "bfloat16"]
    assert {op for op, _ in tried} == set(OPERATORS) and len(tried) == 3 * len(OPERATORS)
    assert {kernels.CASES.get(op, op) for op, _ in tried} <= set(cases.OPERATORS)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="would measure the GPU")
def test_without_a_gpu_it_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run_command(["doctor", "--kernels"]) == 2
    assert "the Triton kernels do not run here" in capsys.readouterr().err
