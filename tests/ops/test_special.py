"""What is special in each operator: rows that are ignored, matches beyond any number, blocks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.bench.cases import Case, Inputs, variant
from mulki.bench.losses import EAGER, MULKI
from mulki.bench.outcomes import outcome
from mulki.functional import clip_contrastive, prototype_similarity
from tests.ops.conftest import Backend
from tests.ops.oracle import REDUCTIONS, check, computed, exact, relative


def inputs_of(*arguments: Tensor, **options: object) -> Inputs:
    """Inputs of which all floating tensors are leaves."""
    names = ("features", "prototypes", "scale", "bias")
    leaves = {
        name: t.requires_grad_()
        for name, t in zip(names, arguments, strict=False)
        if t.is_floating_point()
    }
    return Inputs(arguments, leaves, None, options)


def near(name: str, inputs: Inputs, tolerance: float, reduction: str = "mean") -> None:
    """All outcomes are the truth, but for a relative tolerance."""
    found, wanted = computed(name, inputs, reduction), exact(name, inputs, reduction)
    for key, want in wanted.items():
        assert relative(found[key], want) < tolerance, key


# --- prototype_cross_entropy


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("classes", [5, 300])
def test_an_ignored_row_counts_for_nothing_whatever_it_holds(
    classes: int, value: float, backend: Backend
) -> None:
    """The gradient of a prototype is a sum of products with the row, so it is left out."""
    for smoothing in (0.0, 0.1):
        torch.manual_seed(0)
        x, w = torch.randn(5, 7).to(backend.device), torch.randn(classes, 7).to(backend.device)
        target = torch.tensor([0, -100, 2, -100, 1], device=backend.device)
        scale = torch.tensor(9.0, device=backend.device)
        spoilt = x.clone()
        spoilt[1], spoilt[3, 2] = value, value
        for reduction in REDUCTIONS:
            found, wanted = (
                computed(
                    "prototype_cross_entropy",
                    Inputs(
                        (rows.requires_grad_(), w, scale, target),
                        {"features": rows},
                        None,
                        {"label_smoothing": smoothing},
                    ),
                    reduction,
                )
                for rows in (spoilt, x)
            )
            for key, want in wanted.items():
                assert found[key].equal(want), key


@pytest.mark.parametrize("scale", [0.7, 1.0, 3.0, 50.0, 64.0, -3.0])
def test_a_class_that_is_infinitely_unlikely(scale: float, backend: Backend) -> None:
    """It counts for nothing in the loss, whatever the scale is rounded to."""
    x, w = torch.zeros(4, 70), torch.zeros(40, 70)
    x[:, 0], w[:, 0] = 10.0, torch.linspace(-0.5, 0.5, 40)
    target, others = torch.tensor([1, 2, 4, 5]), torch.arange(40) != 3
    wanted = F.cross_entropy(scale * (x @ w[others].T).double(), target - (target > 3).long())
    w[3, 0] = -math.copysign(3e38, scale)
    here = (t.to(backend.device) for t in (x, w, torch.tensor(scale), target))
    loss = MULKI["prototype_cross_entropy"](*here)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_all_rows_ignored(backend: Backend) -> None:
    inputs = variant("ce_all", device=backend.device).inputs()
    inputs.arguments[3].fill_(-100)
    for reduction in REDUCTIONS:
        found = computed("prototype_cross_entropy", inputs, reduction)
        for key, value in found.items():
            of_mean = key.startswith("loss") and reduction == "mean"
            assert value.isnan().all() if of_mean else value.eq(0).all()


# --- contrastive and pair_kl


@pytest.mark.parametrize("scale", [30.0, 60.0])
def test_pairs_that_match_well(scale: float, backend: Backend) -> None:
    """The loss is what a logarithm of 1 and a little leaves."""
    x = Case("contrastive", 200, 200, 64, "float32", backend.device, seed=1).inputs().arguments[0]
    x = x.detach()
    inputs = inputs_of(x.clone(), x.clone(), torch.tensor(scale, device=backend.device))
    truth = exact("contrastive", inputs)
    unfused = outcome(EAGER["contrastive"], inputs)
    for key, got in computed("contrastive", inputs).items():
        assert relative(got, truth[key]) < 3 * relative(unfused[key], truth[key]) + 1e-5


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_what_a_bad_row_of_contrastive_holds_stays_there(bad: float, backend: Backend) -> None:
    """It is in a sum of every column, where -infinity adds nothing."""
    torch.manual_seed(0)
    x, w = (torch.rand(300, 4) + 0.1 for _ in range(2))
    x[290] = bad
    here = x.to(backend.device), w.to(backend.device)
    loss = clip_contrastive(*here, 1.0, reduction="none").cpu()
    z = x.double() @ w.double().T
    want = (z.logsumexp(1) + z.logsumexp(0)) / 2 - z.diagonal()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert loss.isfinite().sum() == (299 if bad == -math.inf else 0)


def test_a_logit_bias_under_a_softmax_has_a_gradient_of_zero(backend: Backend) -> None:
    x, w, scale = variant("contrastive", device=backend.device).inputs().arguments
    for reduction in REDUCTIONS:
        bias = torch.tensor(-3.0, requires_grad=True, device=backend.device)
        loss = clip_contrastive(x, w, scale, bias, reduction=reduction)
        assert torch.autograd.grad(loss.sum(), bias)[0] == 0
        assert loss.equal(clip_contrastive(x, w, scale, reduction=reduction))


@pytest.mark.parametrize(("name", "n"), [("pairs_label", 1700), ("contrastive", 2600)])
def test_many_pairs(name: str, n: int, backend: Backend) -> None:
    """More than C++ keeps the products of."""
    if backend.name != "cpp":
        pytest.skip("keeps none")
    for dtype in ("float32", "bfloat16"):
        case = variant(name, n, d=16, dtype=dtype, scale=20.0)
        check(case.operator, case.inputs())


# --- siglip


@pytest.mark.parametrize(("scale", "bias"), [(100.0, -60.0), (60.0, -40.0), (720.0, 0.0)])
def test_siglip_of_pairs_that_match_well_or_badly(
    scale: float, bias: float, backend: Backend
) -> None:
    x = Case("siglip", 200, 200, 64, "float32", backend.device).inputs().arguments[0].detach()
    for w in (x.clone(), -x):
        numbers = (torch.tensor(value, device=backend.device) for value in (scale, bias))
        near("siglip", inputs_of(x.clone(), w, *numbers), 2e-5)


def test_siglip_of_a_match_beyond_any_number(backend: Backend) -> None:
    """It is as good as certain, so only the other columns have a loss."""
    x, w = (torch.zeros(9, 8, device=backend.device) for _ in range(2))
    x[5, 0] = w[5, 0] = 1e10
    total = MULKI["siglip"](x, w, 1e30, -3.0, reduction="sum")
    # All logits but this one are the bias.
    wanted = 72 * math.log1p(math.exp(-3.0)) + 8 * math.log1p(math.exp(3.0))
    assert total.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("p", [3, 32])
def test_an_infinite_feature_gives_the_bias_what_columns_give_it(p: int, backend: Backend) -> None:
    """Whether there are columns beyond P that fill a block, or none."""
    x, w = torch.zeros(3, 8), torch.zeros(p, 8)
    w[:, 0] = -1.0
    x[0, 0], w[0, 0] = math.inf, 1.0
    scale, bias = (torch.tensor(value, device=backend.device) for value in (2.0, -3.0))
    arguments = x.to(backend.device), w.to(backend.device), scale, bias.requires_grad_()
    inputs = Inputs(arguments, {"bias": bias}, None, {"offset": 0})
    found, wanted = computed("siglip", inputs, "sum"), exact("siglip", inputs, "sum")
    assert found["loss"].isfinite()
    torch.testing.assert_close(found["gradient of bias"].double(), wanted["gradient of bias"])


@pytest.mark.parametrize("offset", [-(2**40), -150, -149, -1, 0, 1, 64, 299, 300, 2**40])
def test_a_block_of_siglip_at_any_offset(offset: int, backend: Backend) -> None:
    for dtype, tolerance in (("float32", 2e-5), ("bfloat16", 5e-3)):
        case = variant("siglip_block", 150, 300, 20, dtype, device=backend.device)
        inputs = Inputs(*_without_options(case.inputs()), {"offset": offset})
        near("siglip", inputs, tolerance, "sum")
        x, w, scale, bias = (t.detach().double().cpu() for t in inputs.arguments)
        signs = torch.full((150, 300), -1.0)
        for i in range(150):
            if 0 <= i + offset < 300:
                signs[i, i + offset] = 1
        want = torch.log1p(torch.exp(-signs * (scale * (x @ w.T) + bias))).sum()
        torch.testing.assert_close(exact("siglip", inputs, "sum")["loss"].cpu(), want)


def _without_options(inputs: Inputs) -> tuple:
    return inputs.arguments, inputs.leaves, None


@pytest.mark.parametrize(("n", "p"), [(0, 3), (3, 0), (0, 0)])
def test_a_block_of_siglip_without_rows_or_columns(n: int, p: int, backend: Backend) -> None:
    x, w = (torch.ones(rows, 4, device=backend.device) for rows in (n, p))
    numbers = (torch.tensor(value, device=backend.device) for value in (2.0, -1.0))
    inputs = inputs_of(x, w, *numbers, offset=0)
    for reduction in ("none", "sum"):
        for key, value in computed("siglip", inputs, reduction).items():
            assert value.eq(0).all(), key


# --- similarity


def test_products_of_tiny_numbers_and_of_many_dimensions(backend: Backend) -> None:
    x = variant("similarity", 8, 8, 64, device=backend.device).inputs().arguments[0].detach()
    for size in (1e-20, 1e-29):
        found = prototype_similarity(x * size, x)
        assert relative(found, (x * size).double() @ x.double().T) < 1e-6
    d = 50_000
    x, w = (torch.full((n, d), v, device=backend.device) for n, v in ((2, 0.25), (3, -0.5)))
    torch.testing.assert_close(prototype_similarity(x, w), torch.full_like(x[:, :3], -0.125 * d))


def test_small_elements_of_a_row_keep_their_digits(backend: Backend) -> None:
    """Sums to which the largest element of a row adds nothing."""
    torch.manual_seed(0)
    x, w = torch.randn(40, 96).to(backend.device), torch.randn(70, 96).to(backend.device)
    x[:, 0], w[:, 0] = 1e6, 0.0
    got = prototype_similarity(x, w).double()
    x, w = x[:, 1:].double(), w[:, 1:].double()
    assert ((got - x @ w.T).abs() <= 1e-6 * (x.abs() @ w.abs().T)).all()


def test_a_row_of_zeros_has_a_finite_gradient_when_normalised(backend: Backend) -> None:
    case = variant("cosines", device=backend.device)
    inputs = case.inputs()
    with torch.no_grad():
        inputs.leaves["features"][1] = 0
    found, wanted = computed("similarity", inputs), exact("similarity", inputs)
    for key, want in wanted.items():
        assert want.isfinite().all()
        torch.testing.assert_close(found[key].double(), want, rtol=1e-5, atol=1e-5)
