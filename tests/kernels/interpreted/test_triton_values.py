"""Values and gradients of every operator in every form, against formulas in float64."""

from __future__ import annotations

import pytest
import torch

from mulki.kernels import common, results, schedule
from tests.kernels.triton_cases import LOSSES, NAMES, make, teacher_kl
from tests.kernels.triton_helpers import (
    TOLERANCE,
    all_close,
    ask,
    backward,
    call,
    close,
    error,
    reduced,
)

HALVES = ("cosines", "ce_all", "kl_label", "kl_weights", "contrastive", "pairs_weights", "siglip")
FLOAT = TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_their_gradients(name):
    case = make(name)
    upstream = case.upstream()
    rows, gradients = case.expected(upstream)
    close(call(case.op, *case.args)[0], rows, FLOAT)
    all_close(backward(case, upstream), gradients, FLOAT)


@pytest.mark.parametrize("name", LOSSES)
def test_means_and_their_gradients(name):
    case = make(name)
    total, gradients = case.expected(mean=True)
    found, made, _ = reduced(case)
    close(found, total, FLOAT)
    all_close(made, gradients, FLOAT)


@pytest.mark.parametrize(
    ("name", "reduction"), [*((name, "mean") for name in LOSSES), ("ce_all", "sum")]
)
def test_gradients_for_an_upstream_gradient_of_a_total(name, reduction):
    case = make(name)
    _, gradients = case.expected(mean=reduction == "mean")
    found = backward(case, torch.tensor(-0.7), reduction=reduction)
    all_close(found, [-0.7 * gradient for gradient in gradients], FLOAT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cosines", "ce_all", "kl_label", "pairs_blend", "siglip"])
def test_gradients_of_the_sum_beside_rows(name, dtype):
    case = make(name, dtype)
    rows, *rest = ask(case, None, "none")
    made, details = rest[-case.leaves :], rest[: -case.leaves]
    for one, other in zip((rows, *details), call(case.op, *case.args), strict=True):
        assert torch.equal(one, other)
    _, gradients = case.expected()
    of_norms = TOLERANCE[dtype] if name == "cosines" and dtype != torch.float32 else 0.0
    all_close(made[:2], gradients[:2], TOLERANCE[dtype] + of_norms)
    assert all(gradient.dtype == torch.float32 for gradient in made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALVES)
def test_half_precision(name, dtype):
    case = make(name, dtype)
    upstream = case.upstream()
    rows, gradients = case.expected(upstream)
    found, made = call(case.op, *case.args)[0], backward(case, upstream)
    close(found, rows, TOLERANCE[found.dtype])
    assert [g.dtype for g in made] == [dtype, dtype, *[torch.float32] * (case.leaves - 2)]
    # Normalised rows are rounded before they are multiplied, too; dscale is a sum that cancels.
    of_norms = TOLERANCE[dtype] if name == "cosines" else 0.0
    all_close(made[:2], gradients[:2], TOLERANCE[dtype] + of_norms)
    all_close(made[2:], gradients[2:], FLOAT + 5 * of_norms)


@pytest.mark.parametrize("name", ["ce_all", "kl_weights"])
def test_reduced_gradients_of_halves_do_not_underflow(name):
    case = make(name, torch.float16, scale=1e-8)
    total, gradients = case.expected()
    found, made, _ = reduced(case, mean=False)
    close(found, total, FLOAT)
    assert gradients[0].abs().max() < 1e-7
    assert all(g.dtype == torch.float32 for g in made)
    all_close(made[:2], gradients[:2], TOLERANCE[torch.float16])


@pytest.mark.parametrize(
    "plan", [None, schedule.Plan("chunks", 8, 35), schedule.Plan("blocks", 8, 16)]
)
@pytest.mark.parametrize("name", ["ce_all", "kl_weights", "siglip"])
def test_gradients_that_wait_in_bfloat16_are_rounded_once(name, plan, monkeypatch):
    """As on a GPU, in one chunk and in several."""
    if plan is not None:
        monkeypatch.setattr(schedule, "plan", lambda problem: plan)
    case = make(name, torch.bfloat16)
    _, wide, _ = reduced(case)
    monkeypatch.setattr(results, "waiting", lambda leaf: leaf.dtype)
    _, found, _ = reduced(case)
    assert [g.dtype for g in found[:3]] == [torch.bfloat16] * 2 + [torch.float32]
    all_close(found[:2], wide[:2], TOLERANCE[torch.bfloat16])
    assert torch.equal(found[2], wide[2])


@pytest.mark.parametrize("name", ["ce", "kl"])
def test_a_missing_upcast_would_be_noticed(name, monkeypatch):
    case = make(name, torch.bfloat16)
    upstream = case.upstream()
    monkeypatch.setattr(common, "upcast", lambda models: False)
    rows, gradients = case.expected(upstream)
    assert error(call(case.op, *case.args)[0], rows) > 10 * TOLERANCE[torch.bfloat16]
    assert error(backward(case, upstream)[0], gradients[0]) > 10 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_details_of_any_number_of_teachers(k):
    case = make("kl_label", k=k)
    want = teacher_kl(*case.double())
    loss, *details = call(case.op, *case.args)
    close(loss, want.loss, FLOAT)
    all_close(details, [want.kl, want.weights, want.entropy], FLOAT)
    upstream = case.upstream()
    all_close(backward(case, upstream), case.expected(upstream)[1], FLOAT)
    _, _, again = reduced(case)
    for one, other in zip(details, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["ce", "kl", "contrastive", "siglip"])
@pytest.mark.parametrize("scale", [-5.0, 0.0])
def test_any_sign_of_the_scale(name, scale):
    case = make(name, scale=scale)
    total, gradients = case.expected(mean=True)
    found, made, _ = reduced(case)
    close(found, total, FLOAT)
    all_close(made, gradients, FLOAT)
