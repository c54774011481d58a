"""What every operator owes on every backend: values, gradients, masks, strides, hostile values.

The cases are those of `mulki.bench.cases`, the bounds those of `oracle`. For Triton:

    TRITON_INTERPRET=1 pytest tests/ops/test_conformance.py -k triton
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mulki import Similarity
from mulki.bench.cases import DTYPES, PAIRED, RAGGED, SMALL, VARIANTS, Case, Inputs, variant
from mulki.bench.losses import EAGER, MULKI
from mulki.bench.outcomes import outcome
from mulki.functional import pair_teacher_kl, teacher_kl
from mulki.ops import use_backend
from tests.ops.conftest import Backend
from tests.ops.oracle import (
    EPS,
    REDUCTIONS,
    check,
    check_case,
    computed,
    error,
    exact,
    relative,
    widened,
)

NAMES = tuple(VARIANTS)
LOSSES = tuple(name for name in NAMES if VARIANTS[name][0] != "similarity")
FORMS = [
    (name, reduction)
    for name in NAMES
    for reduction in (REDUCTIONS if name in LOSSES else ("none",))
]
#: One of each operator, with most of its options.
BROAD = ("cosines", "ce_all", "kl_blend", "pairs_label", "contrastive", "siglip")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "reduction"), FORMS)
def test_values_and_gradients(name: str, reduction: str, dtype: str, backend: Backend) -> None:
    case = variant(name, n=37, p=53, d=64, dtype=dtype, device=backend.device, scale=30.0)
    check_case(case, reduction, backend.cuts)


@pytest.mark.parametrize(("n", "p", "d"), [*RAGGED, *SMALL])
def test_shapes(n: int, p: int, d: int, backend: Backend) -> None:
    few = backend.name == "triton" and backend.device == "cpu"
    for name, dtype in itertools.product(NAMES, ("float32", "bfloat16")):
        if few and n * p * d > 64 * 100 * 17:
            continue  # for want of time
        case = variant(name, n=n, p=p, d=d, dtype=dtype, device=backend.device, scale=20.0)
        check_case(case, "mean", backend.cuts)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_cut_rows_and_columns(
    name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of at most 64 KiB at a time, of 600 KiB a model."""
    if backend.name != "chunked":
        pytest.skip("has blocks of its own")
    monkeypatch.setenv("MULKI_CHUNK_MB", "0.0625")
    for dtype, reduction in (("float32", "mean"), ("bfloat16", "none")):
        case = variant(name, n=300, p=500, d=24, dtype=dtype, device=backend.device, scale=30.0)
        check_case(case, reduction)


@pytest.mark.parametrize("scale", [1e-4, 0.0, -20.0, 1e3, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_scales(name: str, scale: float, backend: Backend) -> None:
    """Gradients of logits of 10,000 may be beyond float16."""
    for dtype, d in itertools.product(DTYPES, (24, 96)):
        case = variant(name, 13, 29, d, dtype, device=backend.device, scale=scale)
        if dtype != "float16" or abs(scale) < 1e3:
            check_case(case, "mean", backend.cuts)
        if name in LOSSES:
            for value in computed(case.operator, case.inputs()).values():
                assert value.isfinite().all()


LAYOUTS = ("transposed", "sliced", "expanded")


def laid_out(inputs: Inputs, layout: str) -> Inputs:
    """The same values (but for expanded ones) with other strides."""

    def change(t: Tensor) -> Tensor:
        if layout == "transposed" or t.ndim == 0:
            return t.mT.contiguous().mT if t.ndim > 1 else t
        if layout == "sliced":
            wide = torch.full(
                [2 * size + 1 for size in t.shape], -7, dtype=t.dtype, device=t.device
            )
            return wide[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)
        return t[:1].expand_as(t) if t.ndim > 1 else t

    return inputs.map(change)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str, layout: str, backend: Backend) -> None:
    for dtype, reduction in itertools.product(("float32", "bfloat16"), ("none", "mean")):
        case = variant(name, 11, 19, 12, dtype, device=backend.device)
        strided = laid_out(case.inputs(), layout)
        dense = strided.map(lambda t: t.clone(memory_format=torch.contiguous_format))
        found, wanted = (computed(case.operator, i, reduction) for i in (strided, dense))
        for key, want in wanted.items():
            # A BLAS may add in another order where strides are others.
            tolerance = {"rtol": 2 * torch.finfo(want.dtype).eps, "atol": 2e-5}
            torch.testing.assert_close(found[key], want, **tolerance)


@pytest.mark.parametrize("name", [name for name in NAMES if VARIANTS[name][0] != "pair_kl"])
def test_no_rows(name: str, backend: Backend) -> None:
    case = variant(name, n=0, device=backend.device)
    inputs = case.inputs()
    for reduction in REDUCTIONS if name in LOSSES else ("none",):
        found = computed(case.operator, inputs, reduction)
        value = found.pop("loss")
        if name in LOSSES and reduction != "none":
            assert value.isnan() if reduction == "mean" else value == 0
        else:
            assert value.shape[0] == 0
        for leaf in inputs.leaves:
            gradient = found[f"gradient of {leaf}"]
            assert gradient.shape == inputs.leaves[leaf].shape and gradient.eq(0).all()


@pytest.mark.parametrize("name", ["ce", "kl", "kl_weights", "pairs", "contrastive"])
def test_one_class_costs_nothing(name: str, backend: Backend) -> None:
    case = variant(name, n=1 if VARIANTS[name][0] in PAIRED else 6, p=1, device=backend.device)
    for value in computed(case.operator, case.inputs()).values():
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_features_without_a_dimension(name: str, backend: Backend) -> None:
    case = variant(name, 4, 5, 1, device=backend.device)
    inputs = case.inputs().map(lambda t: t[:, :0] if t.ndim == 2 and t.shape[1] in (1, 4, 7) else t)
    if "weights" in inputs.options or case.operator == "similarity":
        pytest.skip("has a matrix of such a width")
    found, wanted = computed(case.operator, inputs), exact(case.operator, inputs)
    for key, want in wanted.items():
        torch.testing.assert_close(found[key].double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ce", "kl", "pairs", "contrastive", "siglip"])
def test_features_with_one_large_dimension(name: str, backend: Backend) -> None:
    """As CLIP's have: what scales a row by its largest element has fewer digits for the others."""
    case = variant(name, 64, 130, 512, device=backend.device, scale=50.0, gap=0.1)
    for height in (1.0, 3.0):

        def peaked(t: Tensor, height: float = height) -> Tensor:
            if t.ndim != 2:
                return t
            return F.normalize(t.index_fill(1, torch.tensor([3], device=t.device), height), dim=1)

        check(case.operator, case.inputs().map(peaked), cuts=backend.cuts)


@pytest.mark.parametrize(("name", "p"), [("ce", 255), ("ce", 5000), ("contrastive", 256)])
def test_gradients_of_logits_that_say_little(name: str, p: int, backend: Backend) -> None:
    """Of a row the match has one half of the gradient, and all others have the other half."""
    check_case(variant(name, 256, p, 128, device=backend.device, scale=1.0))


def test_many_classes_and_many_teachers(backend: Backend) -> None:
    case = variant("kl_label", 70, 25_000, 3, device=backend.device)
    check_case(case)
    case = variant("kl_confidence", 5, 9, 4, device=backend.device)
    inputs = case.inputs()
    *student, teachers, target = inputs.arguments
    many = Inputs((*student, teachers * 4, target), inputs.leaves, None, inputs.options)
    check(case.operator, many)


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_student_near_its_teacher_keeps_its_gradient(
    dtype: str, gap: float, backend: Backend
) -> None:
    """Where continual learning starts, and where rounded logits leave nothing of the gradient."""
    case = Case("dual_teacher_kl", 64, 100, 64, dtype, backend.device, scale=50.0, gap=gap)
    for reduction in ("none", "mean"):
        check_case(case, reduction, backend.cuts)
    if dtype != "float32":
        inputs, key = case.inputs(), "gradient of features"
        truth = exact(case.operator, inputs)[key]
        with torch.autocast(backend.device, DTYPES[dtype]):
            unfused = outcome(EAGER[case.operator], inputs)[key]
        assert error(computed(case.operator, inputs)[key], truth) < error(unfused, truth) / 4


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_teachers_far_from_their_student(scale: float, backend: Backend) -> None:
    """Few elements of a row of the gradient by the logits are then far larger than the others."""
    case = Case("teacher_kl_1", 96, 600, 256, "float32", backend.device, scale=scale, gap=3.0)
    inputs = case.inputs()
    found, truth, wide = (f(case.operator, inputs) for f in (computed, exact, widened))
    for key in ("gradient of features", "gradient of prototypes"):
        allowed = 2 * error(wide[key], truth[key]) + EPS * truth[key].norm().item()
        assert error(found[key], truth[key]) <= allowed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "n"), [("teacher_kl_1", 9), ("pair_kl", 5), ("pair_kl", 200)])
def test_a_student_that_is_its_only_teacher_has_a_gradient_of_zero(
    name: str, n: int, dtype: str, backend: Backend
) -> None:
    if (n, dtype) == (200, "bfloat16") or (backend.cuts and n == 200):
        pytest.skip("as with five pairs")
    x, w, scale, _, target = (
        Case(name, n, n if name == "pair_kl" else 300, 20, dtype, backend.device, scale=50.0)
        .inputs()
        .arguments
    )
    itself = (x.detach(), w.detach(), scale.detach())
    leaves = {"features": x, "prototypes": w, "scale": scale}
    found = computed(name, Inputs((x, w, scale, (itself,), target), leaves, None))
    of_pairs = 1e-5 if name == "pair_kl" else 0.0
    for key, value in found.items():
        assert value.abs().max() <= (of_pairs if key.startswith("loss") else 0), key


@pytest.mark.parametrize("name", ["kl_label", "kl_confidence", "kl_weights", "pairs_blend"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_products(name: str, dtype: str, backend: Backend) -> None:
    """Divergences, weights and entropies, none of which is differentiable."""
    case = variant(name, 23, 31, 24, dtype, device=backend.device)

    def details(inputs: Inputs) -> Any:
        return inputs.call(MULKI[case.operator], return_details=True)[1]

    found = details(case.inputs())
    with use_backend("reference"):
        wanted = details(case.inputs(torch.float64))
    for key, got in found._asdict().items():
        want = getattr(wanted, key)
        assert got.dtype == torch.float32 and not got.requires_grad
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5, msg=key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_and_shapes_of_what_comes_back(name: str, dtype: str, backend: Backend) -> None:
    """Losses are wide; gradients have the dtype of their leaf, and a frozen leaf has none."""
    case = variant(name, dtype=dtype, device=backend.device)
    inputs = case.inputs()
    wide = DTYPES[dtype] if case.operator == "similarity" else torch.float32
    everything = computed(case.operator, inputs)
    assert everything["loss"].dtype == wide
    for leaf, tensor in inputs.leaves.items():
        gradient = everything[f"gradient of {leaf}"]
        assert (gradient.dtype, gradient.shape) == (tensor.dtype, tensor.shape)
    for left_out in itertools.chain.from_iterable(
        itertools.combinations(inputs.leaves, size) for size in range(1, len(inputs.leaves))
    ):
        some = inputs.without(left_out)
        found = computed(case.operator, some)
        for key, value in found.items():
            assert value.equal(everything[key]), (key, left_out)
        assert not any(f"gradient of {leaf}" in found for leaf in left_out)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_again_and_nothing_mutated(name: str, backend: Backend) -> None:
    """In C++ on any number of threads; matrix products of PyTorch do not promise that."""
    shapes = ((131, 33, "float32"), (600, 66, "bfloat16"))
    threads = torch.get_num_threads()
    for n, d, dtype in shapes[: 1 if backend.cuts else 2]:
        case = variant(name, n, 67, d, dtype, device=backend.device)
        inputs = case.inputs()
        counts = (1, 2, 9, 2) if backend.name == "cpp" and name in LOSSES else (threads,) * 2
        found = []
        try:
            for number in counts:
                torch.set_num_threads(number)
                of_both = [computed(case.operator, inputs, r) for r in ("none", "mean")]
                found.append([value for one in of_both for value in one.values()])
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
        before = case.inputs()
        assert all(torch.equal(inputs.leaves[k], leaf) for k, leaf in before.leaves.items())
        assert all(leaf._version == 0 for leaf in inputs.leaves.values())


def spoilt(t: Tensor, row: int, value: float) -> Tensor:
    bad = t.detach().clone()
    bad[row] = value
    return bad.requires_grad_(t.requires_grad)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", BROAD)
def test_what_is_not_finite_stays_so(name: str, value: float, backend: Backend) -> None:
    """A row of features: what of the losses and their gradients is finite is what the truth says,
    but for rows that a finite logit of another order of operations may save or spoil.
    """
    case = variant(name, 70, 80, 24, device=backend.device)
    inputs = case.inputs()
    x, *rest = inputs.arguments
    x = spoilt(x, 66, value)
    bad = Inputs((x, *rest), {**inputs.leaves, "features": x}, inputs.upstream, inputs.options)
    rows = computed(case.operator, bad, "none")
    others = torch.arange(70, device=x.device) != 66
    wanted = exact(case.operator, bad, "none")
    assert rows["loss"].isfinite().equal(wanted["loss"].isfinite())
    if math.isnan(value):
        assert not rows["loss"][66].isfinite().any()
        assert name == "cosines" or computed(case.operator, bad)["loss"].isnan()
        assert not rows["gradient of prototypes"].isfinite().all()
    if name not in ("contrastive", "pairs_label"):  # a row is in the softmax of every column there
        assert rows["gradient of features"][others].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["ce_all", "kl_label", "kl_weights"])
def test_what_an_excluded_class_holds_does_not_matter(
    name: str, bad: float, backend: Backend
) -> None:
    case = variant(name, 6, 8, 5, device=backend.device)
    inputs = case.inputs()
    excluded = inputs.map(
        lambda t: spoilt(t, 1, bad) if t.ndim == 2 and len(t) == 8 else t  # class 1 is masked
    )
    want, got = (computed(case.operator, i, "none") for i in (inputs, excluded))
    assert got["loss"].equal(want["loss"])


@pytest.mark.parametrize("classes", [(0, 40), (130, 250), (390, 400)])
@pytest.mark.parametrize("name", ["ce_all", "kl_label"])
def test_the_classes_of_one_task_alone(
    name: str, classes: tuple[int, int], backend: Backend
) -> None:
    """They are next to each other, so that whole tiles of columns have none of them."""
    low, high = classes
    case = variant(name, 70, 400, 9, device=backend.device)
    inputs = case.inputs()
    *rest, target = inputs.arguments
    places = torch.arange(400, device=target.device)
    mask = (places >= low) & (places < high)
    target = torch.where(target < 0, target, low + target % (high - low))
    options = {**inputs.options, "class_mask": mask}
    of_task = Inputs((*rest, target), inputs.leaves, None, options)
    check(case.operator, of_task)
    of_prototypes = computed(case.operator, of_task)["gradient of prototypes"]
    assert of_prototypes[~mask].eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_upstream_gradient_that_is_not_finite_stays_with_its_row(
    bad: float, backend: Backend
) -> None:
    case = variant("ce", 6, 7, 5, device=backend.device)
    inputs = case.inputs()
    x, w, *_ = inputs.arguments
    for place in (0, 2, 5):
        loss = inputs.call(MULKI[case.operator], reduction="none")
        grad = torch.ones(6, device=x.device)
        want = torch.autograd.grad(loss, x, grad, retain_graph=True)[0]
        grad[place] = bad
        dx, dw = torch.autograd.grad(loss, (x, w), grad)
        others = torch.arange(6, device=x.device) != place
        assert not dx[place].isfinite().any() and not dw.isfinite().all()
        torch.testing.assert_close(dx[others], want[others], rtol=1e-5, atol=1e-6)


def test_totals_beyond_the_largest_float_are_infinite(backend: Backend) -> None:
    """A loss, and the gradient of a scale, whose rows are finite."""
    x = torch.full((3, 2), 1e30, device=backend.device).requires_grad_()
    w = torch.tensor([[1e8, 0.0], [-1e8, 0.0]], device=backend.device)
    scale = torch.ones((), device=backend.device).requires_grad_()
    target = torch.ones(3, dtype=torch.int64, device=backend.device)
    inputs = Inputs((x, w, scale, target), {"features": x, "scale": scale}, None)
    assert computed("prototype_cross_entropy", inputs, "none")["loss"].isfinite().all()
    total = computed("prototype_cross_entropy", inputs, "sum")
    assert total["loss"] == math.inf and total["gradient of scale"] == math.inf


@pytest.mark.parametrize("level", [0.0, -100.0, 300.0])
@pytest.mark.parametrize("spread", [1.0, 25.0, 200.0])
@pytest.mark.parametrize("name", ["contrastive", "pairs"])
def test_logits_far_from_zero_or_from_one_another(
    name: str, spread: float, level: float, backend: Backend
) -> None:
    """Then a row and a column share no exponentials. The last tile of columns is not full."""
    n = 40 if backend.cuts else 200
    for dtype in DTYPES:
        case = variant(name, n, n, 16, dtype, device=backend.device, scale=spread)
        generator = torch.Generator().manual_seed(0)
        number = itertools.count()

        def far(t: Tensor, generator: Any = generator, number: Any = number) -> Tensor:
            if t.ndim != 2:
                return t
            sizes = torch.rand(len(t), 1, generator=generator).sqrt().to(t)
            rows = t * sizes
            # The first column of features is 1, that of texts the level.
            rows[:, 0] = 1.0 if next(number) % 2 == 0 else level / spread
            return rows

        inputs = case.inputs().map(far)
        # Halves of G times large numbers that it cancels are as imprecise without fusing.
        if dtype == "float32":
            check(case.operator, inputs)
        for value in computed(case.operator, inputs).values():
            assert value.isfinite().all()


@pytest.mark.parametrize("scale", [100.0, 1e3, 1e4])
def test_equal_pairs_have_no_gradient_however_large_their_logits_are(
    scale: float, backend: Backend
) -> None:
    for name, n in (("contrastive", 2), ("pair_kl", 3)):
        x, w = (torch.ones(n, 1, device=backend.device).requires_grad_() for _ in range(2))
        factor = torch.tensor(scale, device=backend.device)
        itself = x.detach(), w.detach(), factor
        rest = () if name == "contrastive" else ((itself, itself), None)
        rows = MULKI[name](x, w, factor, *rest, reduction="none")
        for gradient in torch.autograd.grad(rows.sum(), (x, w)):
            assert gradient.abs().max() <= 1e-6 * scale


def test_a_loss_scaler_acts_before_the_gradient_is_rounded_to_half_precision(
    backend: Backend,
) -> None:
    case = Case("teacher_kl_1", 64, 100, 16, "float16", backend.device, scale=1.0, gap=1e-3)
    inputs = case.inputs().without(("prototypes", "scale"))
    truth = exact(case.operator, inputs)["gradient of features"]
    assert truth.abs().max() < torch.finfo(torch.float16).tiny
    (gradient,) = torch.autograd.grad(
        inputs.call(MULKI[case.operator]) * 2.0**20, inputs.leaves["features"]
    )
    assert relative(gradient.double() / 2**20, truth) < 1e-2


def test_autocast_rounds_the_features_and_nothing_else(backend: Backend) -> None:
    for name in LOSSES:
        case = variant(name, device=backend.device)
        inputs = case.inputs()
        rounded = inputs.map(lambda t: t.bfloat16() if t.ndim == 2 and t.shape[1] > 3 else t)
        with torch.autocast(backend.device, torch.bfloat16):
            got = computed(case.operator, inputs)
        want = computed(case.operator, rounded)
        assert got["loss"].dtype == torch.float32 and got["loss"].equal(want["loss"]), name
        for leaf, tensor in inputs.leaves.items():
            assert got[f"gradient of {leaf}"].dtype == tensor.dtype
        if backend.name != "reference":  # which leaves float64 alone
            continue
        double = case.inputs(torch.float64)
        with torch.autocast(backend.device, torch.bfloat16):
            assert computed(case.operator, double)["loss"].dtype == torch.float64


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("bfloat16", "float32"), ("bfloat16", "float16"), ("float32", "bfloat16")],
)
def test_models_of_two_dtypes_are_promoted(student: str, teacher: str, backend: Backend) -> None:
    for distil, n in ((teacher_kl, 6), (pair_teacher_kl, 5)):
        own, other = (
            Case("similarity", n, 5, 4, dtype, backend.device, scale=7.0, seed=seed).inputs()
            for seed, dtype in enumerate((student, teacher))
        )
        teachers = [Similarity(*other.arguments).detach(), Similarity(*own.arguments).detach()]
        loss = distil(Similarity(*own.arguments), teachers, temperature=2.0)
        with use_backend("reference"):
            exactly = [Similarity(*(t.double() for t in s.operands)) for s in teachers]
            own_exactly = Similarity(*own.to(torch.float64).arguments)
            want = distil(own_exactly, exactly, temperature=2.0)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
        features = own.leaves["features"]
        assert torch.autograd.grad(loss, features)[0].dtype == DTYPES[student]
