"""What must hold at the edges: memory, labels, masks, ties with the teacher, and no rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mulki.kernels import common
from tests.kernels.triton_cases import NAMES, Case, make
from tests.kernels.triton_helpers import TOLERANCE, all_close, backward, call, close, reduced
from tests.kernels.triton_memory import BAND, poisoned

FLOAT = TOLERANCE[torch.float32]


def surrounded(t: Tensor) -> Tensor:
    """The same numbers in rows that lie apart, NaN on all sides."""
    n, d = t.shape
    step = d + 5
    buffer = poisoned(2 * BAND + n * step, t.dtype)
    rows = buffer[BAND : BAND + n * step].view(n, step)[:, 2 : 2 + d]
    rows.copy_(t)
    return rows


def banded(t: Tensor) -> Tensor:
    """The same numbers between bands of NaN, or of bytes or integers that index far away."""
    if t.dtype.is_floating_point:
        buffer = poisoned(2 * BAND + t.numel(), t.dtype)
    else:
        far = 1 if t.dtype == torch.bool else 10**6
        buffer = torch.full((2 * BAND + t.numel(),), far).to(t.dtype)
    inner = buffer[BAND : BAND + t.numel()].view(t.shape)
    inner.copy_(t)
    return inner


def enclosed(value):
    if isinstance(value, list):
        return [enclosed(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    return surrounded(value) if value.ndim == 2 and value.shape[1] > 4 else banded(value)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_beside_the_arguments(name):
    case = make(name)
    inside = Case(case.op, tuple(enclosed(a) for a in case.args))
    upstream = case.upstream()
    grad = surrounded(upstream) if upstream.ndim == 2 else banded(upstream)
    for one, other in zip(
        [*call(case.op, *inside.args), *backward(inside, grad)],
        [*call(case.op, *case.args), *backward(case, upstream)],
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["cosines", "kl_weights", "siglip"])
def test_any_strides(name):
    case = make(name)
    x, w, *rest = case.args
    columns = Case(case.op, (x.T.contiguous().T, w.T.contiguous().T, *rest))
    upstream = case.upstream()
    all_close(backward(columns, upstream), backward(case, upstream), 0.0)
    # A row that stands for many, and an upstream gradient that is one number.
    same = Case(case.op, (x[:1].expand_as(x), w, *rest))
    apart = Case(case.op, (x[:1].repeat(x.shape[0], 1), w, *rest))
    one = upstream.flatten()[:1].expand(upstream.numel()).view(upstream.shape)
    all_close(backward(same, one), backward(apart, one.contiguous()), 0.0)


@pytest.mark.parametrize("name", ["ce", "kl_weights"])
def test_an_infinite_upstream_gradient_of_float16_stays_with_its_row(name):
    case = make(name, dtype=torch.float16)
    upstream = case.upstream()
    dx, *_ = backward(case, upstream)
    upstream[0] = math.inf
    spoilt, *_ = backward(case, upstream)
    assert not spoilt[0].isfinite().any()
    torch.testing.assert_close(spoilt[1:], dx[1:], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_that_is_its_teacher_has_exactly_zero(temperature):
    case = make("kl")
    x, w, scale, *_ = case.args
    weights = torch.tensor([[0.25, 0.75]]).expand(x.shape[0], 2)
    args = x, w, scale, [x, x], [w, w], [scale, scale]
    same = Case("teacher_kl", (*args, weights, None, None, temperature, 1.0, 0.0, 0.0, True))
    loss, kl, _, _ = call("teacher_kl", *same.args)
    assert not loss.any() and not kl.any()
    one = (*args[:3], [x], [w], [scale], weights[:, :1])
    total, gradients, _ = reduced(
        Case("teacher_kl", (*one, None, None, temperature, 1.0, 0.0, 0.0, True))
    )
    assert total == 0 and not any(g.any() for g in gradients)
    pairs = make("pairs")
    x, w, *_ = pairs.args
    options = None, temperature, 1.0, 0.0, 0.0, True
    total, gradients, _ = reduced(Case("pair_kl", (x, w, scale, [x], [w], [scale], *options)))
    assert total == 0 and not any(g.any() for g in gradients)


def test_a_student_near_its_teacher_keeps_its_gradient():
    case = make("kl", torch.bfloat16, k=1)
    x, w, scale, _, _, _, *rest = case.args
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    teacher = (x.float() + 0.02 * noise).bfloat16()
    near = Case("teacher_kl", (x, w, scale, [teacher], [w], [scale], *rest))
    _, want = near.expected()
    all_close(reduced(near, mean=False)[1], want, 2e-4)


@pytest.mark.parametrize("bad", [-1, 35, 10**12])
def test_a_target_out_of_range_makes_its_row_nan_and_no_other(bad):
    case = make("ce_all")
    args = list(case.args)
    want = call(case.op, *args)[0]
    args[3] = args[3].clone()
    args[3][2] = bad
    loss = call(case.op, *args)[0]
    others = torch.arange(loss.shape[0]) != 2
    assert loss[2].isnan() and torch.equal(loss[others], want[others])
    dx, _, _ = backward(Case(case.op, tuple(args)), case.upstream())
    assert dx[2].isnan().all() and not dx[others].isnan().any()


def test_a_target_of_an_excluded_class_makes_its_row_nan():
    for name in ("ce_all", "kl_label"):
        case = make(name)
        args = list(case.args)
        at = 3 if name == "ce_all" else 7
        args[at] = args[at].clone()
        args[at][2] = 1
        loss = call(case.op, *args)[0]
        assert loss[2].isnan() and not loss[torch.arange(loss.shape[0]) != 2].isnan().any()


@pytest.mark.parametrize("name", ["cosines", "ce_all", "kl_weights", "contrastive", "siglip"])
def test_gradients_that_are_not_wanted_are_empty(name):
    case = make(name)
    upstream = case.upstream()
    full = backward(case, upstream)
    for i in range(case.leaves + 1):
        wanted = [j == i for j in range(case.leaves)]
        made = backward(case, upstream, wanted)
        if case.op != "similarity":
            assert [g.numel() > 0 for g in reduced(case, wanted=wanted)[1]] == wanted
        for got, want, asked in zip(made, full, wanted, strict=True):
            assert got.dtype == want.dtype
            if asked:
                close(got, want, 1e-6)
            else:
                assert got.shape == (0,)


def test_ignored_rows_alone():
    case = make("ce_all")
    args = list(case.args)
    args[3] = torch.full_like(args[3], -100)
    nothing = Case(case.op, tuple(args))
    assert not call(case.op, *args)[0].any()
    total, gradients, _ = reduced(nothing)
    assert math.isnan(total) and not any(g.any() for g in gradients)
    total, gradients, _ = reduced(nothing, mean=False)
    assert total == 0 and not any(g.any() for g in gradients)
    # What a mean over no rows sends back.
    grad = torch.full((args[0].shape[0],), math.nan)
    assert not any(g.any() for g in backward(nothing, grad))


@pytest.mark.parametrize("half", [slice(0, 18), slice(17, 35)])
def test_tiles_without_a_class_that_takes_part(half):
    for name in ("ce_all", "kl_label"):
        case = make(name)
        args = list(case.args)
        mask = torch.zeros(35, dtype=torch.bool)
        mask[half] = True
        at, of_mask = (3, 4) if name == "ce_all" else (7, 8)
        ignored = args[at] == -100
        args[at] = torch.where(ignored, -100, half.start + args[at].clamp(min=0) % 17)
        args[of_mask] = mask
        masked = Case(case.op, tuple(args))
        upstream = case.upstream()
        rows, want = masked.expected(upstream)
        close(call(case.op, *args)[0], rows, FLOAT)
        all_close(backward(masked, upstream), want, FLOAT)


def test_extreme_logits():
    for name in ("ce", "kl", "contrastive", "pairs", "siglip"):
        case = make(name, scale=1e4)
        total, want = case.expected(mean=True)
        if name == "siglip":
            # The formula of the test overflows where log(1 + exp u) is u.
            z = 1e4 * (case.x.double() @ case.args[1].double().T) - 3
            signs = 2 * torch.eye(z.shape[0], dtype=torch.float64) - 1
            total = torch.nn.functional.softplus(-signs * z).sum(1).mean()
        found, got, _ = reduced(case)
        close(found, total, 1e-5)
        assert all(g.isfinite().all() for g in got)
        if name != "siglip":
            # Logits of 1e4 are rounded to 1e-3.
            all_close(got, want, 5e-3)


def test_a_nan_reaches_the_loss():
    for name in ("ce", "kl", "contrastive", "pairs", "siglip"):
        case = make(name)
        args = list(case.args)
        args[0] = args[0].clone()
        args[0][3, 5] = math.nan
        assert call(case.op, *args)[0][3].isnan()


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    case = make(name)
    empty = tuple(_without_rows(a, case.x.shape[0]) for a in case.args)
    none = Case(case.op, empty)
    common.empty_float32(case.x, 0)  # the memory fixture wants an allocation
    out = call(case.op, *empty)
    assert out[0].shape == ((0, 35) if case.op == "similarity" else (0,))
    dx, dw, *numbers = backward(none, none.upstream())
    assert dx.shape == empty[0].shape and dw.shape == empty[1].shape and not dw.any()
    assert all(number == 0 for number in numbers)
    if case.op != "similarity":
        assert math.isnan(reduced(none)[0]) and reduced(none, mean=False)[0] == 0


def _without_rows(value, n):
    if isinstance(value, list):
        return [_without_rows(v, n) for v in value]
    return value[:0] if isinstance(value, Tensor) and value.ndim and len(value) == n else value


@pytest.mark.parametrize("scale", [100.0, 1e3, 1e4])
def test_gradients_of_equal_pairs_at_large_logits(scale):
    ones = torch.ones(2, 1)
    case = Case("contrastive", (ones, ones, torch.tensor(scale)))
    for gradient in backward(case, torch.ones(2)):
        assert gradient.abs().max() <= 1e-6 * scale
