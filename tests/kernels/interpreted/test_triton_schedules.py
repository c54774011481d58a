"""Every schedule gives the results of every other: whole rows, chunks, and blocks of columns."""

from __future__ import annotations

import math

import pytest
import torch

from mulki.kernels import chunks, common, schedule, sums
from mulki.kernels.schedule import Plan
from tests.kernels.triton_cases import Case, make
from tests.kernels.triton_checks import in_one_memory
from tests.kernels.triton_helpers import TOLERANCE, all_close, backward, call, close, error, reduced

FLOAT = TOLERANCE[torch.float32]

# Of 19 rows and 35 columns: one block, and blocks that leave some over.
PLANS = (
    Plan("rows", 16, 35),
    Plan("chunks", 19, 35),
    Plan("chunks", 8, 35),
    Plan("blocks", 19, 32),
    Plan("blocks", 7, 16),
)
PAIRS = ("contrastive", "pairs_blend", "pairs_weights", "siglip_block")
# No kernel keeps whole rows of pairs.
CASES = [(name, plan) for name in ("ce_all", "kl_label") for plan in PLANS]
CASES += [(name, plan) for name in PAIRS for plan in PLANS[1:]]


def named(value):
    return "-".join(map(str, value)) if isinstance(value, Plan) else value


@pytest.fixture
def take(monkeypatch):
    def these(plan):
        common.empty_float32(torch.ones(1), 1)  # the memory fixture wants an allocation
        monkeypatch.setattr(schedule, "plan", lambda problem: plan)

    return these


@pytest.mark.parametrize(("name", "plan"), CASES, ids=named)
def test_rows_and_gradients(name, plan, take):
    case = make(name)
    rows, of_rows = case.expected(case.upstream())
    take(plan)
    close(call(case.op, *case.args)[0], rows, FLOAT)
    all_close(backward(case, case.upstream()), of_rows, FLOAT)


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[2], PLANS[4]], ids=named)
@pytest.mark.parametrize("name", ["ce_all", "kl_weights", *PAIRS])
def test_totals_in_half_precision(name, plan, take):
    """G of half precision lies over the logits of which it is made."""
    case = make(name, torch.float16)
    total, want = case.expected(mean=True)
    if (name, plan) in ((one, PLANS[0]) for one in PAIRS):
        plan = PLANS[3]
    take(plan)
    found, made, details = reduced(case)
    close(found, total, FLOAT)
    all_close(made, want, TOLERANCE[torch.float16] * 2)
    if details:
        all_close(details, call(case.op, *case.args)[1 : 1 + len(details)], FLOAT)


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[2]], ids=named)
@pytest.mark.parametrize("size", [1e-5, 300.0])
def test_small_and_large_float16_gradients_keep_their_precision(size, plan, take, monkeypatch):
    # Most of G is below the normal numbers of float16 or, after a fixed factor, above the largest.
    take(plan)
    case = make("ce", torch.float16, scale=30.0)
    upstream = size * case.upstream()
    _, want = case.expected(upstream)
    error_of = [error(g, w) for g, w in zip(backward(case, upstream), want, strict=True)]
    assert max(error_of) < 2e-3
    usual = sums.Factors.of

    def without_bound(*of, **options):
        factors = usual(*of, **options)
        return factors._replace(bound=None, largest=256.0 if size < 1 else 1.0)

    monkeypatch.setattr(sums.Factors, "of", without_bound)
    assert not error(backward(case, upstream)[1], want[1]) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("plan", PLANS, ids=named)
def test_ignored_rows_that_are_not_finite(plan, value, dtype, take):
    take(plan)
    case = make("ce_all", dtype)
    total, (want, *_), _ = reduced(case)
    args = list(case.args)
    args[0] = torch.where((args[3] == -100)[:, None], value, args[0])
    assert not args[0].isfinite().all()
    again, (dx, *_), _ = reduced(Case(case.op, tuple(args)))
    assert torch.equal(again, total) and torch.equal(dx, want)


def test_a_row_that_one_tile_holds_is_read_once(monkeypatch):
    """The same results with a tile for all columns, as on a GPU, as with several."""
    monkeypatch.setattr(schedule, "plan", lambda problem: PLANS[2])
    for name in ("ce_all", "kl_label"):
        case = make(name)
        several = backward(case, case.upstream())
        whole = schedule.RowTile(8, 64, 1)
        with monkeypatch.context() as patch:
            patch.setattr(schedule, "row_tile", lambda *of, whole=whole: whole)
            all_close(backward(case, case.upstream()), several, FLOAT)


def test_one_row_of_one_column():
    for name in ("similarity", "ce", "kl", "contrastive", "siglip"):
        case = make(name, n=1, p=1, d=1)
        upstream = case.upstream()
        rows, want = case.expected(upstream)
        got = [call(case.op, *case.args)[0], *backward(case, upstream)]
        for one, other in zip(got, [rows, *want], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("plan", PLANS[1::2], ids=named)
def test_a_student_that_is_its_teacher_has_exactly_zero(plan, take):
    take(plan)
    x, w, scale, *_ = make("kl").args
    teacher = [x], [w], [scale], None, None, None, 3.0, 1.0, 0.0, 0.0, True
    total, gradients, _ = reduced(Case("teacher_kl", (x, w, scale, *teacher)))
    assert total == 0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("plan", PLANS[2::2], ids=named)
def test_a_nan_in_a_late_column_reaches_the_loss(plan, take):
    take(plan)
    case = make("ce")
    args = list(case.args)
    args[1] = args[1].clone()
    args[1][33] = torch.nan
    assert call(case.op, *args)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [PLANS[1], PLANS[4]], ids=named)
@pytest.mark.parametrize("name", ["kl_blend", "pairs_weights"])
@pytest.mark.parametrize(
    ("lie", "models"), [("together", [3]), ("student apart", [1] * 3), ("backwards", [1] * 3)]
)
def test_models_whose_operands_lie_in_one_memory_are_one_product(
    lie, models, name, plan, dtype, take, monkeypatch
):
    of_products, multiply = [], chunks.multiply

    def noted(a, b, out, add=False):
        of_products.append(len(a) if a.dim() == 3 else 1)
        multiply(a, b, out, add)

    case = in_one_memory(make(name, dtype), backwards=lie == "backwards")
    if lie == "student apart":
        case = case._replace(args=(case.args[0].clone(), *case.args[1:]))
    rows, of_rows = case.expected(case.upstream())
    take(plan)
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "multiply", noted)
        close(call(case.op, *case.args)[0], rows, TOLERANCE[dtype])
    n, p = case.args[0].shape[0], case.args[1].shape[0]
    assert of_products == models * (math.ceil(n / plan.rows) * math.ceil(p / plan.columns))
    all_close(backward(case, case.upstream()), of_rows, TOLERANCE[dtype] * 2)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_student_beside_its_copies_in_one_memory_has_exactly_zero(backwards, take):
    take(PLANS[2])
    case = make("kl_label")
    x, w, scale = case.args[:3]
    same = [x.clone(), x.clone()], [w.clone(), w.clone()], [scale, scale.clone()]
    case = in_one_memory(Case(case.op, (x, w, scale, *same, *case.args[6:])), backwards)
    assert torch.equal(call(case.op, *case.args)[0], torch.zeros(len(x)))
    assert all(not g.any() for g in backward(case, case.upstream()))
