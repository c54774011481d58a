"""What must hold at the edges: memory, chunks, labels, masks, ties with the teacher, large logits.

Values at plain shapes are in tests/ops/test_conformance.py, which serves Triton too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.bench.cases import VARIANTS, variant
from mulki.kernels import gradients, pair_kl
from mulki.kernels.lookup import kernel
from mulki.ops.operators import OPERATORS, Request
from tests.kernels.interpreted.conftest import BAND, poisoned
from tests.ops import op_cases
from tests.ops.oracle import check_case, computed

NAMES = ("cosines", "ce_all", "kl_blend", "kl_weights", "pairs_label", "contrastive", "siglip")
LOSSES = NAMES[1:]


def ask(case: op_cases.Case, grad: Tensor | None = None, reduction: str = "none") -> Any:
    """All results: those of rows without gradients, or the others with all."""
    x = OPERATORS[case.op].arguments(*case.args)
    wanted = [grad is not None or reduction != "none"] * case.leaves
    return kernel(case.op)(x, Request(grad, reduction, wanted))


def surrounded(t: Tensor) -> Tensor:
    """The same numbers in rows that lie apart, NaN on all sides."""
    n, d = t.shape
    buffer = poisoned(2 * BAND + n * (d + 5), t.dtype)
    rows = buffer[BAND : BAND + n * (d + 5)].view(n, d + 5)[:, 2 : 2 + d]
    return rows.copy_(t)


def enclosed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [enclosed(v) for v in value]
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.ndim == 2 and value.shape[1] > 4:
        return surrounded(value)
    if value.dtype.is_floating_point:
        buffer = poisoned(2 * BAND + value.numel(), value.dtype)
    else:  # bytes, or integers that index far away
        far = 1 if value.dtype == torch.bool else 10**6
        buffer = torch.full((2 * BAND + value.numel(),), far).to(value.dtype)
    return buffer[BAND : BAND + value.numel()].view(value.shape).copy_(value)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_beside_the_arguments(name):
    case = op_cases.make(name, 19, 35, 20, torch.float32)
    inside = op_cases.Case(case.op, tuple(enclosed(a) for a in case.args))
    grad = op_cases.upstream(case)
    found = [*ask(inside), *ask(inside, enclosed(grad))]
    for one, other in zip(found, [*ask(case), *ask(case, grad)], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_of_rows_and_chunks_of_pairs(name, dtype, monkeypatch):
    """No memory for more than one tile of rows."""
    for module in (gradients, pair_kl):
        monkeypatch.setattr(module, "MEMORY", 1)
    case = variant(name, 37, 35, 20, dtype)
    check_case(case, "mean", cuts=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["ce_all", "kl_blend", "kl_weights", "pairs_blend", "contrastive"])
def test_logits_that_are_stored_where_products_are_large(name, dtype, monkeypatch):
    loaded = []
    multiply = gradients.multiply
    monkeypatch.setattr(pair_kl, "multiply", lambda *of: (loaded.append(of), multiply(*of)))
    d = 520 if dtype == "float32" else 1030
    case = variant(name, 5, 33, d, dtype)
    check_case(case, "mean", cuts=True)
    assert bool(loaded) == (case.operator in ("contrastive", "pair_kl"))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 1e4, -1e4])
def test_divergences_at_any_temperature(temperature, scale):
    for name in ("kl_blend", "pairs_blend"):
        case = variant(name, 7, 21, 20, scale=scale)
        options = {**dict(case.options), "temperature": temperature}
        check_case(replace(case, options=tuple(options.items())))


def test_a_student_that_is_its_teacher_has_exactly_zero():
    x, w = op_cases.make("kl", 19, 35, 20, torch.float32).args[:2]
    scale, weights = torch.tensor(9.0), torch.rand(19, 2)
    of_teachers = [x, x], [w, w], [scale, scale]
    numbers = 3.0, 1.0, 0.0, 0.0, True
    case = op_cases.Case("teacher_kl", (x, w, scale, *of_teachers, weights, None, None, *numbers))
    loss, kl, *_ = ask(case)
    assert not loss.any() and not kl.any()
    assert not any(one.any() for one in ask(case, reduction="sum")[4:])
    pairs = x, w[:19], scale, [x, x], [w[:19]] * 2, [scale, scale], None
    case = op_cases.Case("pair_kl", (*pairs, *numbers, 1.0, 0.0))
    loss, kl, _, _, _, *found = ask(case, reduction="sum")
    assert loss == 0 and not kl.any() and not any(one.any() for one in found)


def test_a_student_near_its_teacher_keeps_its_gradient():
    case = variant("kl", 19, 35, 20, "bfloat16", gap=0.02)
    check_case(case, "mean", cuts=True)


@pytest.mark.parametrize("bad", [-1, 35, 10**12, 1])
def test_a_target_that_is_no_class_makes_its_row_nan_and_no_other(bad):
    """Class 1 is masked."""
    for name, place in (("ce_all", 3), ("kl_label", 7)):
        case = op_cases.make(name, 19, 35, 20, torch.float32)
        args = list(case.args)
        args[place] = args[place].clone()
        args[place][2] = bad
        wrong, others = op_cases.Case(case.op, tuple(args)), torch.arange(19) != 2
        loss = ask(wrong)[0]
        assert loss[2].isnan() and torch.equal(loss[others], ask(case)[0][others])
        of_x = ask(wrong, torch.ones(19))[-3]
        assert of_x[2].isnan().all() and of_x[others].isfinite().all()


@pytest.mark.parametrize("name", ["ce", "kl_weights", "contrastive"])
def test_an_infinite_upstream_gradient_of_float16_stays_with_its_row(name):
    case = op_cases.make(name, 19, 35, 20, torch.float16)
    upstream = op_cases.upstream(case)
    of_x = ask(case, upstream)[-3]
    upstream[0] = math.inf
    spoilt = ask(case, upstream)[-3]
    assert not spoilt[0].isfinite().any()
    if name != "contrastive":  # whose pair is in every column
        torch.testing.assert_close(spoilt[1:], of_x[1:], rtol=2e-2, atol=1e-3)


def test_gradients_of_float16_do_not_underflow():
    case = op_cases.make("ce_all", 19, 35, 20, torch.float16, scale=1e-8)
    _, wanted = op_cases.expected(case, mean=False)
    assert wanted[0].abs().max() < 1e-7
    for got, want in zip(ask(case, reduction="sum")[-3:], wanted, strict=True):
        assert got.dtype == torch.float32 and op_cases.relative(got, want) < 1e-3


@pytest.mark.parametrize("half", [slice(0, 18), slice(17, 35)])
def test_tiles_without_a_class_that_takes_part(half):
    for name, place in (("ce_all", 3), ("kl_label", 7)):
        case = op_cases.make(name, 19, 35, 20, torch.float32)
        args = list(case.args)
        args[place] = half.start + args[place].clamp(min=0) % 17
        args[place + 1] = torch.zeros(35, dtype=torch.bool)
        args[place + 1][half] = True
        masked = op_cases.Case(case.op, tuple(args))
        rows, wanted = op_cases.expected(masked)
        assert op_cases.relative(ask(masked)[0], rows) < 5e-6
        for got, want in zip(ask(masked, op_cases.upstream(masked))[-3:], wanted, strict=True):
            assert op_cases.relative(got, want) < 5e-6


def test_ignored_rows_alone():
    case = op_cases.make("ce_all", 19, 35, 20, torch.float32)
    args = list(case.args)
    args[3] = torch.full_like(args[3], -100)
    nothing = op_cases.Case(case.op, tuple(args))
    assert not ask(nothing)[0].any()
    total, *found = ask(nothing, reduction="mean")
    assert total.isnan() and not any(one.any() for one in found)
    # What a mean over no rows sends back.
    assert not any(one.any() for one in ask(nothing, torch.full((19,), math.nan)))


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_reaches_the_loss(name):
    case = op_cases.make(name, 19, 35, 20, torch.float32)
    args = list(case.args)
    args[0] = args[0].clone()
    row = 4  # which is not ignored
    args[0][row, 5] = math.nan
    assert ask(op_cases.Case(case.op, tuple(args)))[0][row].isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_that_are_not_wanted_are_empty(name):
    inputs = variant(name, 19, 35, 20).inputs()
    every = computed(VARIANTS[name][0], inputs)
    leaves = list(inputs.leaves)
    for leaf in leaves:
        alone = computed(VARIANTS[name][0], inputs.without([one for one in leaves if one != leaf]))
        found = alone[f"gradient of {leaf}"]
        torch.testing.assert_close(found, every[f"gradient of {leaf}"], rtol=1e-5, atol=1e-7)


def test_an_offset_beyond_all_columns_has_no_match():
    x, w, scale, bias, _ = op_cases.make("siglip", 19, 35, 20, torch.float32).args
    far, near = (
        ask(op_cases.Case("siglip", (x, w, scale, bias, offset)))[0] for offset in (2**40, 19)
    )
    assert torch.equal(far, near)
