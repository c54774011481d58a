from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.app.cli import run_command
from mulki.bench import call_cost
from mulki.bench.cases import (
    Case,
)
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS, Provider


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="an older torch")
@pytest.mark.parametrize("operator", ["teacher_kl_1", "dual_teacher_kl", "teacher_kl_3"])
def test_linear_cross_entropy_of_probabilities_is_the_kl(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets: list[Tensor] = []
    right = F.linear_cross_entropy

    def noted(x: Tensor, w: Tensor, target: Tensor, **options: object) -> Tensor:
        targets.append(target)
        return right(x, w, target, **options)

    monkeypatch.setattr(F, "linear_cross_entropy", noted)
    (result,) = measure_case(
        Case(operator, 33, 17, 64, "float32"), ("torch_lce",), ("both",), seconds=1e-9
    )
    assert result.status == "timed", result.notes
    for target in targets:
        assert target.shape == (33, 17) and target.dtype == torch.float32
        torch.testing.assert_close(target.sum(1), torch.ones(33))


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="an older torch")
def test_linear_cross_entropy_in_chunks() -> None:
    case = Case("prototype_cross_entropy", 33, 17, 64, "float32")
    results = measure_case(case, ("torch_lce", "torch_lce-chunks"), ("backward",), seconds=1e-9)
    assert [r.status for r in results] == ["timed"] * 2, results
    # Without options the gradients are formed in the backward pass.
    assert ["throughput" in r.metrics for r in results] == [True, False]


def test_an_older_torch_has_no_linear_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    case = Case("prototype_cross_entropy", 4, 4, 8, "float32")
    assert "has no linear_cross_entropy" in str(PROVIDERS["torch_lce"].refusal(case))
    assert "has no chunks" in str(PROVIDERS["torch_lce-chunks"].refusal(case))


@pytest.mark.parametrize(
    ("name", "operator", "dtype", "reason"),
    [
        ("torch_lce", "pair_kl", "bfloat16", "labels or probabilities alone"),
        ("torch_lce", "siglip", "bfloat16", "labels or probabilities alone"),
        ("torch_lce-chunks", "dual_teacher_kl", "bfloat16", "labels alone"),
    ],
)
def test_what_torch_does_not_have(name: str, operator: str, dtype: str, reason: str) -> None:
    assert reason in str(PROVIDERS[name].refusal(Case(operator, 4, 4, 8, dtype)))


def test_what_a_peer_gets_wrong_is_no_failure_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = call_cost.ProductRates(torch_mm=1e9, similarity=1e9)
    monkeypatch.setattr(call_cost, "product_rate", lambda dtype, device: rates)
    monkeypatch.setattr(call_cost, "copy_rate", lambda device: 1e9)

    def wrong(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        return 2 * F.cross_entropy(scale * x @ w.T, target)

    given = ("--shapes", "6x5x4", "--ops", "prototype_cross_entropy", "--dtypes", "fp32")
    for peer, status in ((True, 0), (False, 1)):
        provider = Provider("torch_lce", lambda case: wrong, peer=peer)
        monkeypatch.setitem(PROVIDERS, "torch_lce", provider)
        arguments = [*given, "--seconds", "1e-9", "--providers", "torch_lce"]
        assert run_command(["bench", *arguments]) == status
        assert "torch_lce: failed: loss: relative error 1" in capsys.readouterr().out
