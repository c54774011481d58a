"""Who computes a case: plain PyTorch, `torch.compile`, PyTorch's own fused loss, and mulki.

Another provider is one more entry of `PROVIDERS`; benchmarks/ops adds losses of other packages.
All are called with the arguments of `Inputs`. Those that are `graphed` replay a whole call,
gradients and all, as a CUDA graph.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from mulki.bench import peers
from mulki.bench.cases import DTYPES, Case
from mulki.bench.losses import EAGER, MULKI, Loss
from mulki.ops.backends import choose, read_environment

#: The most logits of a call that is captured: beyond, its memory would be missed elsewhere, and
#: launches take no share of its time.
GRAPH_LOGITS = 1 << 26


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
    graphed: bool = False
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


def _no_graphs(device: str) -> str | None:
    return None if torch.device(device).type == "cuda" else "wants a CUDA GPU"


def _graph_refusal(case: Case) -> str | None:
    if case.n * case.p <= GRAPH_LOGITS:
        return None
    return f"captures calls of at most {GRAPH_LOGITS} logits"


@functools.lru_cache(maxsize=1)  # a reset would also forget what the graph's rival has compiled
def _compiled(case: Case) -> Loss:
    # Without a reset a second shape would be compiled for any shape, which is slower.
    torch.compiler.reset()
    return torch.compile(EAGER[case.operator], fullgraph=True, dynamic=False)


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
    several = case.teachers and case.operator != "pair_kl"
    op = "teacher_kl" if several else case.operator
    kind = torch.device(case.device).type
    served = choose(op, kind, DTYPES[case.dtype])
    backend = served.backend if case.n * case.p >= served.least else "chunked"
    return f"served by {backend}" + (f" ({served.reasons})" if served.rejected else "")


def _eager(case: Case) -> Loss:
    return EAGER[case.operator]


def _set_to(name: str, **variables: str) -> Provider:
    return Provider(
        name,
        lambda case: MULKI[case.operator],
        context=lambda case: setting(**variables),
        early_gradients=True,
        strict=True,
    )


def _as_graph(provider: Provider) -> Provider:
    return replace(provider, absence=_no_graphs, refusal=_graph_refusal, graphed=True)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("eager", _eager, context=autocast, note=_autocast_note),
        Provider("compile", _compiled, context=autocast, note=_autocast_note),
        _as_graph(Provider("graph", _eager, context=autocast, note=_autocast_note)),
        _as_graph(Provider("compile-graph", _compiled, context=autocast, note=_autocast_note)),
        Provider(
            "products",
            lambda case: EAGER["similarity"],
            note=lambda case: f"{case.teachers + 3} products of torch.mm, forward and backward",
            products=True,
        ),
        Provider(
            "torch_lce",
            peers.torch_lce,
            context=lambda case: autocast(case) if case.teachers else nullcontext(),
            refusal=peers.torch_lce_refusal,
            peer=True,
        ),
        Provider(
            "torch_lce-chunks",
            peers.torch_lce_chunks,
            refusal=peers.torch_lce_chunks_refusal,
            early_gradients=True,
            peer=True,
        ),
        Provider(
            "mulki",
            lambda case: MULKI[case.operator],
            note=_served,
            early_gradients=True,
            strict=True,
        ),
        _as_graph(
            Provider("mulki-graph", lambda case: MULKI[case.operator], note=_served, strict=True)
        ),
        _set_to("mulki-chunked", MULKI_BACKEND="chunked"),
        _set_to("mulki-chunked-compiled", MULKI_BACKEND="chunked", MULKI_COMPILE="1"),
        _set_to("mulki-reference", MULKI_BACKEND="reference"),
    )
}
