"""A result that is wrong is reported and not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.bench.cases import (
    MODES,
    OPERATORS,
    Case,
)
from mulki.bench.losses import EAGER, MULKI
from mulki.bench.outcomes import outcome
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS, Provider
from mulki.bench.verify import Verifier
from tests.bench.bench_helpers import CASE, wrong_provider


def raising_provider() -> Provider:
    def make(case: Case) -> Callable[..., Tensor]:
        raise RuntimeError("no kernel\nfor this")

    return Provider("raising", make)


def test_what_is_wrong_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setitem(PROVIDERS, "wrong", wrong_provider(calls))
    monkeypatch.setitem(PROVIDERS, "raising", raising_provider())
    results = measure_case(CASE, ("eager", "wrong", "raising"), MODES, seconds=0.01)
    assert [(r.mode, r.provider) for r in results] == [
        (mode, name) for mode in MODES for name in ("eager", "wrong", "raising")
    ]
    by_provider = {r.provider: r for r in results}
    assert by_provider["eager"].status == "timed" and by_provider["eager"].metrics
    wrong, raising = by_provider["wrong"], by_provider["raising"]
    assert wrong.status == raising.status == "failed"
    assert not wrong.metrics and wrong.rounds == 0
    assert "gradient of features: relative error 0.01" in "; ".join(wrong.notes)
    assert raising.notes == ("RuntimeError: no kernel",)
    # Once with autograd and once without, to verify it; a timed one is called often.
    assert len(calls) == 2


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("place", range(3))
def test_an_error_of_one_percent_in_one_gradient_is_noticed(operator: str, place: int) -> None:
    case = Case(operator, 24, 24, 32, "float32")
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    name = list(inputs.leaves)[place]

    def slightly_off(*arguments: Tensor) -> Tensor:
        changed = list(arguments)
        leaf = changed[place]
        # The same value; the gradient is one percent too large.
        changed[place] = leaf + 0.01 * (leaf - leaf.detach())
        return EAGER[operator](*changed)

    problems = verifier.problems(verifier.errors(outcome(slightly_off, inputs)), strict=True)
    assert len(problems) == 1 and problems[0].startswith(f"gradient of {name}: relative error 0.01")
    assert not verifier.problems(verifier.errors(outcome(MULKI[operator], inputs)), strict=True)


def test_a_wrong_loss_and_one_that_is_not_finite_are_noticed() -> None:
    inputs = CASE.inputs()
    verifier = Verifier(CASE, inputs)
    right = EAGER[CASE.operator]

    def wrong_without_autograd(*arguments: Tensor) -> Tensor:
        return right(*arguments) * (1.0 if torch.is_grad_enabled() else 1.01)

    problems = verifier.problems(
        verifier.errors(outcome(wrong_without_autograd, inputs)), strict=True
    )
    assert [p.partition(":")[0] for p in problems] == ["loss without autograd"]
    found = outcome(right, inputs)
    found["gradient of prototypes"][0, 0] = torch.nan
    problems = verifier.problems(verifier.errors(found), strict=True)
    assert [p.partition(":")[0] for p in problems] == ["gradient of prototypes"]


def test_a_loss_that_is_zero_is_right() -> None:
    case = Case("prototype_cross_entropy", 6, 1, 4, "float32")
    inputs = case.inputs()
    errors = Verifier(case, inputs).errors(outcome(EAGER[case.operator], inputs))
    assert set(errors.values()) == {0.0}


def test_an_unfused_result_that_is_not_finite_excuses_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("prototype_cross_entropy", 7, 5, 16, "float32")
    right = EAGER[case.operator]

    def overflows(x: Tensor, *others: Tensor) -> Tensor:
        value = right(x, *others)
        return value if x.dtype == torch.float64 else value * torch.inf

    inputs = case.inputs()
    monkeypatch.setitem(EAGER, case.operator, overflows)
    verifier = Verifier(case, inputs)
    problems = verifier.problems(verifier.errors(outcome(overflows, inputs)), strict=True)
    assert "loss: relative error inf, allowed 2e-05" in problems
    assert not verifier.problems(verifier.errors(outcome(right, inputs)), strict=True)


def test_rounded_logits_are_forgiven_to_others_alone() -> None:
    """What storing bf16 logits costs the eager loss is more than the tolerance by itself."""
    case = Case("dual_teacher_kl", 24, 24, 64, "bfloat16")
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    with PROVIDERS["eager"].context(case):
        eager = verifier.errors(outcome(EAGER[case.operator], inputs))
    mulki = verifier.errors(outcome(MULKI[case.operator], inputs))
    assert not verifier.problems(eager, strict=False)
    assert not verifier.problems(mulki, strict=True)
    assert any("gradient of features" in p for p in verifier.problems(eager, strict=True))
    of_ours = {name for name, provider in PROVIDERS.items() if provider.strict}
    assert of_ours == {name for name in PROVIDERS if name.startswith("mulki")}


def test_a_large_case_is_verified_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the last row alone is noticed, though no chunk holds more than two rows."""
    case = Case("siglip", 7, 7, 16, "float32")
    monkeypatch.setattr("mulki.bench.outcomes.in_chunks.__defaults__", (2 * case.p,))
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    right = EAGER[case.operator]
    assert not verifier.problems(verifier.errors(outcome(right, inputs)), strict=True)

    def last_row_is_off(x: Tensor, *others: Any) -> Tensor:
        off = 0.01 * (x[-1:] - x[-1:].detach())
        return right(torch.cat([x[:-1], x[-1:] + off]), *others)

    problems = verifier.problems(verifier.errors(outcome(last_row_is_off, inputs)), strict=True)
    assert [p.partition(":")[0] for p in problems] == ["gradient of features"]
