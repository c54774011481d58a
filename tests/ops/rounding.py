"""What rounding may do to an operator, in float32 and half precision.

The truth is float64 on the same, rounded inputs. The yardstick is plain PyTorch on those inputs
converted to float32: a kernel that keeps its logits in the accumulator may be no worse, but for the
rounding of its result. Code that computes logits in the dtype of its inputs is far beyond that in
half precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.ops.op_cases import (
    Case,
    asking,
    count,
    doubled,
    expected,
    requiring_grad,
    run,
    specification,
    upstream,
)

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
EPS = torch.finfo(torch.float32).eps
SLACK = 3  # one order of summation against another


def widened(case: Case, mean: bool | None) -> list[Tensor]:
    """Rows (mean: None) or total, and gradients: the reference under autograd in float32."""
    wide = requiring_grad(Case(case.op, tuple(_float(a) for a in case.args)))
    out = specification(wide)
    grad = upstream(case).float() if mean is None else None
    if mean is not None:
        out = out.sum() / (count(case) if mean else 1)
    return [out.detach(), *torch.autograd.grad(out, wide.args[: case.leaves], grad)]


def _float(value: object) -> object:
    if isinstance(value, list):
        return [_float(v) for v in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def ours(case: Case, mean: bool | None) -> list[Tensor]:
    """The same by the operator."""
    wanted = [True] * case.leaves
    if mean is None:
        return [run(case)[0], *run(asking(case, "backward", wanted))[-case.leaves :]]
    output = run(asking(case, "reduced", wanted, mean))
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
    if case.op in ("contrastive", "pair_kl"):
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
    return scale.abs() * size @ w.abs(), scale.abs() * size.T @ x.abs()


def rounded_products(case: Case, mean: bool | None) -> list[float]:
    """What rounding G = dL/dz to the dtype of the inputs does to the gradients, as L2 norms.

    A kernel may round G with a factor in it, so the worst of several factors counts. Entries of one
    size are rounded alike, which no bound by independent errors covers. Few numbers may be lucky
    with all of the factors: rows get some standard deviations of independent errors.
    """
    x, w, scale, *rest = (doubled(a) for a in case.args)
    cosine = x @ w.T
    # The logits in place of the features: G is the gradient.
    z = (scale * cosine).requires_grad_()
    identity = torch.eye(len(w), dtype=z.dtype)
    out = specification(Case(case.op, (z, identity, z.new_tensor(1.0), *rest)))
    if mean is not None:
        out = out.sum() / (count(case) if mean else 1)
    grad = upstream(case).double() if mean is None else None
    (g,) = torch.autograd.grad(out, z, grad)
    worst = [0.0] * case.leaves
    for factor in (1.0, 1.13, 1.37, 1.61, 1.87):
        off = (factor * g).to(case.args[0].dtype).double() / factor - g
        products = (scale * off @ w, scale * off.T @ x, (off * cosine).sum(), off.sum())
        worst = [max(a, p.norm().item()) for a, p in zip(worst, products, strict=False)]
    variance = (torch.finfo(case.args[0].dtype).eps / 2 * g).square() / 3
    variances = (
        scale.square() * (variance @ w.square()),
        scale.square() * (variance.T @ x.square()),
    )
    for i, v in enumerate(variances):
        worst[i] = max(worst[i], (1 + 3 / v.numel() ** 0.5) * v.sum().sqrt().item())
    return worst


def cosines(case: Case) -> Tensor:
    x, w, _, normalize = case.args
    return specification(Case(case.op, (x.double(), w.double(), 1.0, normalize)))


def compared(case: Case, mean: bool | None) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """What the operator gives, what plain PyTorch does in float32, the truth, and the bound."""
    value, gradients = expected(case, mean)
    truth = [value, *gradients]
    sizes = magnitudes(case, mean, len(truth))
    inputs = torch.finfo(case.args[0].dtype).eps
    for i, (got, wide, want) in enumerate(
        zip(ours(case, mean), widened(case, mean), truth, strict=True)
    ):
        # Besides the result, half precision may round G before it is multiplied by W, and rows when
        # they are normalised.
        rounding = want.norm().item() * (torch.finfo(got.dtype).eps + (inputs if i else 0)) / 2
        if case.op == "similarity" and i == 3:
            rounding = inputs / 2 * (upstream(case).double() * cosines(case)).norm().item()
        if case.op == "siglip" and i in (1, 2):
            rounding += inputs / 2 * terms(case, mean)[i - 1].norm().item()
        underflow = torch.finfo(case.args[0].dtype).tiny * got.numel() ** 0.5
        bound = SLACK * error(wide, want) + rounding + EPS * sizes[i] + underflow
        yield got, wide, want, bound


def check(case: Case, mean: bool | None) -> None:
    """Loss and gradients, by relative L2, cosine and signed bias."""
    inputs = torch.finfo(case.args[0].dtype).eps
    for i, (got, wide, want, bound) in enumerate(compared(case, mean)):
        assert got.isfinite().all(), i
        assert error(got, want) <= bound, (i, error(got, want), bound)
        if i in (1, 2) and want.norm() > 8 * bound:
            relative = bound / want.norm().item()
            wide_distance = SLACK**2 * cosine_distance(wide, want)
            assert cosine_distance(got, want) <= wide_distance + inputs**2 + 1e-12, i
            # An error that leans to no side cancels over rows; within a row it need not.
            lean = (got.double() - want).mean().abs().item() / want.abs().mean().item()
            wide_lean = (wide.double() - want).mean().abs().item() / want.abs().mean().item()
            assert lean <= SLACK * wide_lean + 4 * relative / len(got) ** 0.5, i
