"""Who computes a case: plain PyTorch, `torch.compile`, PyTorch's own fused loss, and mulki.

Another provider is one more entry of `PROVIDERS`; benchmarks/ops adds losses of other packages.
All are called with the arguments of `Inputs`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.bench.cases import DTYPES, OPERATORS, Case
from mulki.bench.losses import EAGER, MULKI, Loss
from mulki.ops.backends import choose, read_environment


@dataclass(frozen=True)
class Provider:
    """One way to compute the cases."""

    name: str
    make: Callable[[Case], Loss]  # the function that is timed
    # Entered off the clock.
    context: Callable[[Case], AbstractContextManager[Any]] = lambda case: nullcontext()
    # Why it is not on a device at all, and why it does not apply to a case; None if it does.
    absence: Callable[[str], str | None] = lambda device: None
    refusal: Callable[[Case], str | None] = lambda case: None
    note: Callable[[Case], str] = lambda case: ""
    # Gradients of a loss are formed in the forward pass of training, so that the time of the
    # backward pass alone says nothing.
    early_gradients: bool = False
    products: bool = False  # is no loss, but the matrix products that one takes at the least
    without: tuple[str, ...] = ()  # leaves that it has no gradient to
    peer: bool = False  # what it gets wrong is shown, and is no failure of ours
    strict: bool = False  # verified without forgiving that logits are rounded


def autocast(case: Case) -> AbstractContextManager[Any]:
    """That of the half precision of a case."""
    # Stays on in the backward pass: it changes nothing there, and leaving it would be timed.
    if case.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(case.device).type, DTYPES[case.dtype])


def _autocast_note(case: Case) -> str:
    return "" if case.dtype == "float32" else "under autocast"


@functools.lru_cache(maxsize=1)
def _compiled(case: Case) -> Loss:
    # Without a reset a second shape would be compiled for any shape, which is slower.
    torch.compiler.reset()
    return torch.compile(EAGER[case.operator], fullgraph=True, dynamic=False)


def _products(case: Case) -> Loss:
    """The least number of products, by torch.mm: K + 1 forward, 2 backward, all of one matrix."""
    made: dict[str, Tensor] = {}

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, *models: Tensor) -> Tensor:
            if not made:
                made.update(z=x.new_zeros(case.n, case.p))
                made.update(dx=torch.empty_like(x), dw=torch.empty_like(w))
            ctx.save_for_backward(x, w)
            for u, v in zip((x, *models[::2]), (w, *models[1::2]), strict=True):
                torch.mm(u, v.T, out=made["z"])
            return x.new_zeros(())

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            x, w = ctx.saved_tensors
            torch.mm(made["z"], w, out=made["dx"])
            torch.mm(made["z"].T, x, out=made["dw"])
            return made["dx"], made["dw"], *(None,) * (2 * case.teachers)

    def call(x: Tensor, w: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        models = [t for u, v, _ in (rest[0] if case.teachers else ()) for t in (u, v)]
        found: Tensor = Products.apply(x, w, *models)
        return found

    return call


def _torch_lce(case: Case) -> Loss:
    # Its options as they are by default: chunks of logits, gradients in the forward pass.
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, scale, target: F.linear_cross_entropy(scale * x, w, target, options=options)


def _torch_lce_refusal(case: Case) -> str | None:
    if case.operator != "prototype_cross_entropy":
        return "has cross-entropy to labels alone"
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunks in linear_cross_entropy"
    return None


@contextmanager
def setting(**variables: str) -> Iterator[None]:
    """A context with these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    read_environment()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        read_environment()


def _served(case: Case) -> str:
    op = OPERATORS[case.operator].name
    kind = torch.device(case.device).type
    served = choose(op, kind, DTYPES[case.dtype])
    backend = served.backend if case.n * case.p >= served.least else "chunked"
    return f"served by {backend}" + (f" ({served.reasons})" if served.rejected else "")


def _ours(name: str, note: Callable[[Case], str] = lambda case: "", **variables: str) -> Provider:
    return Provider(
        name,
        lambda case: MULKI[case.operator],
        context=lambda case: setting(**variables),
        note=note,
        early_gradients=True,
        strict=True,
    )


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("eager", lambda case: EAGER[case.operator], context=autocast, note=_autocast_note),
        Provider("compile", _compiled, context=autocast, note=_autocast_note),
        Provider(
            "products",
            _products,
            refusal=lambda case: "is one itself" if case.operator == "similarity" else None,
            note=lambda case: f"{case.teachers + 3} products of torch.mm, forward and backward",
            products=True,
            without=("scale", "bias"),
        ),
        Provider(
            "torch_lce",
            _torch_lce,
            refusal=_torch_lce_refusal,
            early_gradients=True,
            peer=True,
        ),
        _ours("mulki", note=_served),
        _ours("mulki-chunked", MULKI_BACKEND="chunked"),
        _ours("mulki-chunked-compiled", MULKI_BACKEND="chunked", MULKI_COMPILE="1"),
        _ours("mulki-reference", MULKI_BACKEND="reference"),
    )
}
