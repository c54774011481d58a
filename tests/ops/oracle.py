"""What rounding may do to an operator, in float32 and half precision.

The truth is the reference in float64 on the same, rounded inputs. The yardstick is the reference on
those inputs in float32: a kernel that keeps its logits in the accumulator may be no worse, but for
the rounding of its result. Code that computes logits in the dtype of its inputs is far beyond that
in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mulki.bench.cases import Case, Inputs
from mulki.bench.losses import EAGER, MULKI, TEMPERATURE
from mulki.bench.outcomes import Outcome, outcome
from mulki.ops import use_backend

EPS = torch.finfo(torch.float32).eps
SLACK = 3  # one order of summation against another

REDUCTIONS = ("none", "sum", "mean")


def computed(operator: str, inputs: Inputs, reduction: str = "mean") -> Outcome:
    """Loss and gradients by the backend that is chosen."""
    asked = {} if operator == "similarity" else {"reduction": reduction}
    return outcome(MULKI[operator], inputs, **asked)


def exact(operator: str, inputs: Inputs, reduction: str = "mean") -> Outcome:
    """The same by the reference in float64."""
    with use_backend("reference"):
        return computed(operator, inputs.to(torch.float64), reduction)


def widened(operator: str, inputs: Inputs, reduction: str = "mean") -> Outcome:
    """The same by the reference in float32."""
    with use_backend("reference"):
        return computed(operator, inputs.to(torch.float32), reduction)


def error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want.double()).norm().item()


def relative(got: Tensor, want: Tensor) -> float:
    """The error of a tensor, as a part of its size."""
    return error(got, want) / max(want.double().norm().item(), 1e-300)


def sizes(operator: str, inputs: Inputs, reduction: str) -> dict[str, float]:
    """What the numbers that are summed to a loss, and to its gradients, are as large as."""
    x, w, scale = (t.detach().double() for t in inputs.arguments[:3])
    steep, few = abs(scale.item()), math.log(max(len(w), 1))
    rows = 1 if reduction == "mean" else max(len(x), 1)
    by_row = 1.0
    if reduction == "none" and len(x):
        by_row = 2.0 if inputs.upstream is None else inputs.upstream.abs().max().item()
    # The terms of a row's gradient by features or prototypes add up to at most twice the scale, and
    # each is the exponential of a logarithm, which may have been rounded at its own size; those of
    # a gradient by a number add up to less than 4, by the scale times the largest product.
    product = 1.0
    if operator != "similarity" and x.numel():
        product = max(1.0, (x @ w.T).abs().max().item())
    entries = float(len(w)) if operator in ("siglip", "similarity") else 1.0
    loss = rows * entries * (steep + few + 1)
    if operator.endswith("kl") or "teacher" in operator:
        # The square of the temperature multiplies divergences, and so the gradients of weights.
        loss *= max(1.0, inputs.options.get("temperature", TEMPERATURE)) ** 2
    if operator in ("contrastive", "pair_kl"):
        # Softmax from logits and a log-sum-exp, both rounded at the size of the scale.
        entries = 1 + steep / 100
    of_rows = rows * entries * by_row
    return {
        "loss": loss,
        "loss without autograd": loss,
        "gradient of features": of_rows * 2 * steep * (1 + few),
        "gradient of prototypes": of_rows * 2 * steep * (1 + few),
        "gradient of scale": of_rows * 4 * product,
        "gradient of bias": of_rows * 4,
        "gradient of weights": loss * by_row,
    }


def terms(operator: str, inputs: Inputs, reduction: str) -> dict[str, Tensor]:
    """What the gradients are sums of, added up without their signs."""
    x, w, scale, *rest = inputs.to(torch.float64).arguments
    x, w, scale = x.detach(), w.detach(), scale.detach()
    z = (scale * x @ w.T).requires_grad_()
    # The logits in place of the features: their gradient is G = dL/dz.
    logits = z, torch.eye(len(w)).to(z), torch.ones_like(scale), *rest
    of_logits = Inputs(logits, {"z": z}, None, inputs.to(torch.float64).options)
    size = exact(operator, of_logits, reduction)["gradient of z"].abs()
    return {
        "gradient of features": scale.abs() * size @ w.abs(),
        "gradient of prototypes": scale.abs() * size.T @ x.abs(),
        "gradient of scale": (size * (x @ w.T).abs()).sum(),
        "gradient of bias": size.sum(),
    }


def roundings(
    operator: str, inputs: Inputs, reduction: str, truth: Outcome, few: bool
) -> dict[str, float]:
    """What half precision may add, which rounds G = dL/dz before it is multiplied by W and X, and
    rows when they are normalised, besides the result.
    """
    half = torch.finfo(inputs.arguments[0].dtype).eps / 2
    found = {
        name: want.norm().item() * (0.0 if name.startswith("loss") else half)
        for name, want in truth.items()
    }
    if operator == "similarity":
        assert inputs.upstream is not None
        x, w, one = inputs.to(torch.float64).arguments
        with torch.no_grad():
            cosines = EAGER[operator](x, w, torch.ones_like(one), **inputs.options)
        found["gradient of scale"] += half * (inputs.upstream.double() * cosines).norm().item()
    elif operator == "siglip" or few:
        # Small sums of large terms, or so few of them that their errors need not cancel.
        for name, size in terms(operator, inputs, reduction).items():
            if name in found:
                found[name] += half * size.norm().item()
    return found


class Compared(NamedTuple):
    name: str
    got: Tensor
    wide: Tensor
    want: Tensor
    bound: float  # of the error of `got`, as L2 norm


def compared(
    operator: str, inputs: Inputs, reduction: str, cuts: bool, few: bool
) -> Iterator[Compared]:
    """What the backend gives, what plain PyTorch does in float32, the truth, and the bound.

    Args:
        cuts: half precision is cut off and not rounded.
        few: errors of single terms are not averaged out.
    """
    truth = exact(operator, inputs, reduction)
    wide = widened(operator, inputs, reduction)
    got = computed(operator, inputs, reduction)
    of_half = roundings(operator, inputs, reduction, truth, few)
    of_sums = sizes(operator, inputs, reduction)
    for name, want in truth.items():
        one = got[name]
        result = want.norm().item() * torch.finfo(one.dtype).eps / 2
        tiny = torch.finfo(inputs.arguments[0].dtype).tiny * one.numel() ** 0.5
        rounding = (result + of_half[name]) * (2 if cuts else 1)
        bound = SLACK * error(wide[name], want) + rounding + EPS * of_sums[name] + tiny
        yield Compared(name, one, wide[name], want, bound)


def check(
    operator: str,
    inputs: Inputs,
    reduction: str = "mean",
    cuts: bool = False,
    few: bool = False,
) -> None:
    """Loss and gradients, by L2, and whether the error of rows leans to a side; see `compared`."""
    for name, got, wide, want, bound in compared(operator, inputs, reduction, cuts, few):
        assert got.shape == want.shape, name
        assert got.isfinite().all(), name
        assert error(got, want) <= bound, (name, error(got, want), bound)
        large = got.ndim == 2 and want.norm() > 8 * bound
        if large and not (name.startswith("loss") or cuts or few):
            # An error that leans to no side cancels over rows; within a row it need not.
            size = want.abs().mean().item()
            lean = (got.double() - want).mean().abs().item() / size
            of_wide = (wide.double() - want).mean().abs().item() / size
            part = bound / want.norm().item()
            assert lean <= SLACK * of_wide + 4 * part / len(got) ** 0.5, name


def check_case(case: Case, reduction: str = "mean", cuts: bool = False) -> None:
    check(case.operator, case.inputs(), reduction, cuts)


def same(found: dict[str, Tensor], other: dict[str, Tensor], **tolerance: Any) -> None:
    """Two outcomes are one, but for a tolerance."""
    assert found.keys() == other.keys()
    for name, want in other.items():
        got = found[name]
        torch.testing.assert_close(
            got, want, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )
