"""Rounding: kernels in float32 and half precision against float64 on the same, rounded inputs.

The yardstick is plain PyTorch on those inputs converted to float32: a kernel that keeps its logits
in the accumulator may be no worse, but for the rounding of its result. `unfused` code, which
computes logits in the dtype of its inputs, is far beyond that in half precision.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mulki.ops.logits import logit_gradients
from tests.ops.op_cases import (
    LOSSES,
    NAMES,
    SPECIFICATION,
    Case,
    count,
    expected,
    first,
    form_arguments,
    make,
    requiring_grad,
    run,
    upstream,
)

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
EPS = torch.finfo(torch.float32).eps
SLACK = 3  # one order of summation against another


def widened(case: Case, mean: bool | None) -> list[Tensor]:
    """Rows (mean: None) or total, and gradients: the reference under autograd in float32."""
    wide = requiring_grad(Case(case.op, tuple(_float(a) for a in case.args)))
    out = SPECIFICATION[case.op](*wide.args)
    grad = upstream(case).float() if mean is None else None
    if mean is not None:
        out = out.sum() / (count(case) if mean else 1)
    return [out.detach(), *torch.autograd.grad(out, wide.args[: case.leaves], grad)]


def _float(value: object) -> object:
    if isinstance(value, list):
        return [_float(v) for v in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def ours(case: Case, mean: bool | None) -> list[Tensor]:
    wanted = [True] * case.leaves
    if mean is None:
        return [first(run(case)), *run(form_arguments(case, "backward", wanted))]
    output = run(form_arguments(case, "reduced", wanted, mean))
    return [output[0], *output[-case.leaves :]]


def error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want).norm().item()


def cosine_distance(got: Tensor, want: Tensor) -> float:
    got, want = got.double().flatten(), want.flatten()
    return 1 - (got @ want / (got.norm() * want.norm())).item()


def magnitudes(case: Case, mean: bool | None, parts: int) -> list[float]:
    """What the numbers that are summed to a loss, and to its gradients, are as large as."""
    x, w, scale = case.args[:3]
    rows = 1 if mean else max(x.shape[0], 1)
    entries = w.shape[0] if case.op in ("siglip", "similarity") else 1
    loss = entries * (abs(scale.item()) + math.log(w.shape[0]) + 1)
    # The terms of a row's gradient by features or prototypes add up to at most twice the scale, and
    # each is the exponential of a logarithm, which may have been rounded at its own size; those of
    # a gradient by a number add up to less than 4, by the scale times the largest product.
    by_row = upstream(case).abs().max().item() if mean is None and len(x) else 1.0
    largest = 2 * abs(scale.item()) * (1 + math.log(w.shape[0]))
    product = 1.0
    if case.op != "similarity" and len(x):
        product = max(1.0, (x.double() @ w.double().T).abs().max().item())
    numbers = [4.0 * by_row * product, 4.0 * by_row]  # by the scale, and by a bias
    gradients = [largest * by_row] * 2 + numbers[: parts - 3]
    if case.op == "contrastive":
        # Softmax from logits and a log-sum-exp, both rounded at the size of the scale.
        entries = 1 + abs(scale.item()) / 100
    return [rows * loss, *(rows * entries * g for g in gradients)]


def terms(case: Case, mean: bool | None) -> tuple[Tensor, Tensor]:
    """What the gradients of siglip by x and w are sums of, added up without the signs."""
    x, w, scale, bias, offset = (a.double() if isinstance(a, Tensor) else a for a in case.args)
    grad = upstream(case) if mean is None else torch.ones(len(x)) / (len(x) if mean else 1)
    z = scale * x @ w.T + bias
    signs = 2 * torch.ones_like(z).tril(offset).triu(offset) - 1
    size = grad.double().abs().unsqueeze(1) * torch.sigmoid(-signs * z)  # of dL/dz
    dx, dw, _ = logit_gradients(size, x.abs(), w.abs(), scale.abs(), [True] * 3)
    return dx, dw


def cosines(case: Case) -> Tensor:
    x, w, _, normalize = case.args
    return SPECIFICATION[case.op](x.double(), w.double(), 1.0, normalize)


def check(case: Case, mean: bool | None) -> None:
    """Loss and gradients, by relative L2, cosine and signed bias."""
    value, gradients = expected(case, mean)
    truth = [value, *gradients]
    sizes = magnitudes(case, mean, len(truth))
    inputs = torch.finfo(case.args[0].dtype).eps
    for i, (got, wide, want) in enumerate(
        zip(ours(case, mean), widened(case, mean), truth, strict=True)
    ):
        assert got.isfinite().all(), i
        # Besides the result, half precision may round G before it is multiplied by W, and rows when
        # they are normalised.
        rounding = want.norm().item() * (torch.finfo(got.dtype).eps + (inputs if i else 0)) / 2
        if case.op == "similarity" and i == 3:
            rounding = inputs / 2 * (upstream(case).double() * cosines(case)).norm().item()
        if case.op == "siglip" and i in (1, 2):
            rounding += inputs / 2 * terms(case, mean)[i - 1].norm().item()
        underflow = torch.finfo(case.args[0].dtype).tiny * got.numel() ** 0.5
        bound = SLACK * error(wide, want) + rounding + EPS * sizes[i] + underflow
        assert error(got, want) <= bound, (i, error(got, want), bound)
        if i in (1, 2) and want.norm() > 8 * bound:
            relative = bound / want.norm().item()
            wide_distance = SLACK**2 * cosine_distance(wide, want)
            assert cosine_distance(got, want) <= wide_distance + inputs**2 + 1e-12, i
            # An error that leans to no side cancels over rows; within a row it need not.
            lean = (got.double() - want).mean().abs().item() / want.abs().mean().item()
            wide_lean = (wide.double() - want).mean().abs().item() / want.abs().mean().item()
            assert lean <= SLACK * wide_lean + 4 * relative / len(got) ** 0.5, i


@pytest.mark.parametrize("mean", [None, True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_operator(name, dtype, mean, backend):
    if name in LOSSES or mean is None:
        check(make(name, n=37, p=53, d=64, dtype=dtype, scale=30.0), mean)


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_student_near_its_teacher_keeps_its_gradient(dtype, gap, backend):
    """Where continual learning starts, and where rounded logits leave nothing of the gradient."""
    case = make("kl", n=64, p=100, d=64, dtype=dtype, scale=50.0, gap=gap)
    for mean in (None, True):
        check(case, mean)
    if dtype in HALVES:
        _, (truth, *_) = expected(case, True)
        wanted = [True, False, False]
        fused = run(form_arguments(case, "reduced", wanted))[4]
        assert error(fused, truth) < error(unfused(case), truth) / 4


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_teachers_far_from_their_student(scale, backend):
    """Few elements of a row of the gradient by the logits are then far larger than the others."""
    case = make("kl", n=96, p=600, d=256, dtype=torch.float32, scale=scale, gap=3.0)
    truth = expected(case, True)[1][:2]
    fused, wide = ours(case, True)[1:3], widened(case, True)[1:3]
    for got, plain, want in zip(fused, wide, truth, strict=True):
        assert error(got, want) <= 2 * error(plain, want) + EPS * want.norm().item()


def unfused(case: Case) -> Tensor:
    """The gradient by the features, logits rounded to the dtype of the inputs."""
    x, w, scale, teacher_x, teacher_w, scales, *_ = case.args
    temperature = case.args[9]
    leaf = x.clone().requires_grad_()
    log_q = F.log_softmax(scale.to(x.dtype) * (leaf @ w.T) / temperature, dim=1).float()
    loss = torch.zeros(())
    for u, v, s in zip(teacher_x, teacher_w, scales, strict=True):
        log_p = F.log_softmax(s.to(x.dtype) * (u @ v.T) / temperature, dim=1).float()
        kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        loss = loss + temperature**2 * kl / len(teacher_x)
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("height", [1.0, 3.0])
@pytest.mark.parametrize("name", ["ce", "kl", "contrastive", "siglip"])
def test_features_with_one_large_dimension(name, height, backend):
    """As CLIP's have: what scales a row by its largest element has fewer digits for the others."""
    case = make(name, n=64, p=130, d=512, dtype=torch.float32, scale=50.0, gap=0.1)

    def peaked(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[:, 3] = height
        return F.normalize(rows, dim=1)

    check(case._replace(args=(*(peaked(a) for a in case.args[:2]), *case.args[2:])), True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", [0.0, -100.0, 300.0])
@pytest.mark.parametrize("spread", [1.0, 25.0, 200.0])
def test_contrastive_of_logits_far_from_zero_or_from_one_another(spread, level, dtype, backend):
    """Then a row and a column share no exponentials. The last tile of columns is not full."""
    torch.manual_seed(0)
    n, d = 200, 16
    rows = [F.normalize(torch.randn(n, d), dim=1) * torch.rand(n, 1).sqrt() for _ in range(2)]
    rows[0][:, 0], rows[1][:, 0] = 1.0, level / spread
    case = Case("contrastive", (*(r.to(dtype) for r in rows), torch.tensor(spread)))
    # Halves of G times large numbers that it cancels are as imprecise without fusing.
    if dtype == torch.float32:
        check(case, True)
    for out in ours(case, True):
        assert out.isfinite().all()


@pytest.mark.parametrize("n", [1900, 2600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrastive_of_more_pairs_than_products_are_kept_of(dtype, n, backend):
    check(make("contrastive", n=n, d=16, dtype=dtype, scale=20.0), True)


@pytest.mark.parametrize(("name", "p"), [("ce", 255), ("ce", 5000), ("contrastive", 256)])
def test_gradients_of_logits_that_say_little(name, p, backend):
    """Of a row the match has one half of the gradient, and all others have the other half."""
    check(make(name, n=256, p=p, d=128, dtype=torch.float32, scale=1.0), True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_student_that_is_its_teacher(dtype, backend):
    case = make("kl", n=9, p=33, d=20, dtype=dtype, scale=50.0, gap=0.0)
    case = Case(case.op, (*case.args[:3], [case.args[0]] * 2, [case.args[1]] * 2, *case.args[5:]))
    total, kl, _, _, *gradients = run(form_arguments(case, "reduced", [True] * 3))
    # Every logit is rounded alike, so nothing is left but the difference of two logarithms.
    assert total.abs() < 50 * EPS and kl.abs().max() < 200 * EPS
    for gradient, size in zip(gradients, (50, 50, 1), strict=True):
        assert gradient.abs().max() <= 4 * EPS * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 0.0, -20.0, 1e3, 1e4])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("d", [24, 96])
def test_scales(d, name, scale, dtype, backend):
    case = make(name, n=13, p=29, d=d, dtype=dtype, scale=scale)
    if dtype != torch.float16 or abs(scale) < 1e4:
        check(case, True)
    for out in (*ours(case, None)[:1], *ours(case, True)):
        assert out.isfinite().all()


@pytest.mark.parametrize(
    ("n", "p", "d"),
    [
        *((1, 1, 1), (1, 7, 3), (7, 1, 64), (64, 100, 17), (130, 257, 33), (5, 1000, 8)),
        *((1, 1, 64), (64, 65, 127), (130, 257, 100), (5, 1000, 65), (9, 31, 2048)),
    ],
)
def test_ragged_shapes(n, p, d, backend):
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            case = make(name, n=n, p=p, d=d, dtype=dtype, scale=20.0)
            check(case, True if name in LOSSES else None)
            if name in LOSSES:
                check(case, None)


LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values (but for expanded ones) with other strides."""
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "sliced":
        odd = math.nan if t.is_floating_point() else -7
        wide = t.new_full([2 * size + 1 for size in t.shape], odd)
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t


def with_layout(case: Case, layout: str) -> Case:
    args = []
    for value in case.args:
        if isinstance(value, list):
            value = [laid_out(v, layout) for v in value]
        elif isinstance(value, Tensor) and value.ndim > 0:
            numbers = value.ndim == 1 and layout in ("transposed", "expanded")
            value = value if numbers else laid_out(value, layout)
        args.append(value)
    return Case(case.op, tuple(args))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name, layout, backend):
    for dtype in (torch.float32, torch.bfloat16):
        case = with_layout(make(name, n=11, p=19, d=12, dtype=dtype), layout)
        dense = Case(case.op, tuple(_dense(a) for a in case.args))
        wanted = [True] * case.leaves
        for form in ("rows", "backward", "reduced"):
            if form == "reduced" and name not in LOSSES:
                continue
            strided, plain = case, dense
            if form != "rows":
                strided, plain = (form_arguments(c, form, wanted) for c in (case, dense))
            if form == "backward":
                grad = laid_out(strided.args[0], "sliced")
                strided = Case(strided.op, (grad, *strided.args[1:]))
            for a, b in zip(_tuple(run(strided)), _tuple(run(plain)), strict=True):
                # A BLAS may add in another order where strides are others.
                atol = 5e-6 if backend == "reference" else 1e-6
                torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=atol)


def _tuple(output: object) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _dense(value: object) -> object:
    if isinstance(value, list):
        return [_dense(v) for v in value]
    return (
        value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
    )


@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [(131, 33, torch.float32), (300, 300, torch.float32), (1100, 66, torch.bfloat16)],
)
@pytest.mark.parametrize("name", NAMES)
def test_results_repeat_bit_for_bit_whatever_the_number_of_threads(name, n, d, dtype, backend):
    case = make(name, n=n, p=67, d=d, dtype=dtype)
    wanted = [True] * case.leaves
    cases = [case, form_arguments(case, "backward", wanted)]
    if name in LOSSES:
        cases.append(form_arguments(case, "reduced", wanted))
    threads = torch.get_num_threads()
    results = []
    try:
        # Matrix products of PyTorch, which the reference is made of, do not promise that.
        for number in (1, 2, 9, 2) if backend == "cpp" else (1, 1):
            torch.set_num_threads(number)
            results.append([out for c in cases for out in _tuple(run(c))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(NAMES),
    n=st.integers(1, 40),
    p=st.integers(1, 70),
    d=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    scale=st.floats(-100, 100, width=32),
    seed=st.integers(0, 5),
    mean=st.sampled_from([None, True, False]),
)
def test_any_shape_dtype_and_layout(backend, name, n, p, d, dtype, layout, scale, seed, mean):
    case = make(name, n=n, p=p, d=d, dtype=dtype, scale=scale, seed=seed)
    check(with_layout(case, layout), mean if name in LOSSES else None)
